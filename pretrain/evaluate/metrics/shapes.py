"""shapes: whether pictures of the captioned shapes show what their captions say, by GenEval's six tasks; needs no weights."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.shapes import Scene, check, scene_of
from data_prep.shapes_checker import by_figure, judge, mean_of_tasks
from pretrain.evaluate.metric import Picture, Record, Result, Value
from pretrain.evaluate.pictures import prompts_of, with_prompts

if TYPE_CHECKING:
    import torch


def arguments(parser: argparse.ArgumentParser) -> None:
    """It has no options."""


def check_prompts(args: argparse.Namespace) -> None:
    """Raises ValueError for prompts that are no captions of shapes."""
    for entry in [] if args.prompts is None else prompts_of(args.prompts):
        scene_of(entry["prompt"])


def build(args: argparse.Namespace, device: torch.device) -> ShapesScorer:
    """The checker."""
    return ShapesScorer()


class ShapesScorer:
    """Compares pictures with the scenes of their captions (data_prep/shapes_checker.py); beside it the strict measure."""

    identity: Mapping[str, Any] = {"checker": 2}
    batch = 16

    def score(self, pictures: Sequence[Picture]) -> list[Record]:
        """Whether each task that the caption sets is fulfilled, and the other figures."""
        asked = [scene_of(prompt) for prompt in with_prompts(pictures, "shapes")]
        return [self._score(picture, scene) for picture, scene in zip(pictures, asked, strict=True)]

    def _score(self, picture: Picture, scene: Scene) -> Record:
        image = picture.open()
        strict = check(image, scene)
        shapes = {} if strict.shapes is None else {"strict_shapes": strict.shapes}
        return {**judge(image, scene).figures, "strict_colours": strict.colours, **shapes}

    def summarise(self, pictures: Sequence[Picture], records: Sequence[Record]) -> Result:
        """The mean of the tasks' scores, and the share of pictures that are right by each figure."""
        figures = by_figure(records)
        shares = {name: Value.mean([float(right) for right in values]) for name, values in figures.items()}
        return Result({"tasks": Value(mean_of_tasks(figures), len(records)), **shares})
