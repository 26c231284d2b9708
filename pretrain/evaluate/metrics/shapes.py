"""shapes: whether pictures of the captioned shapes show what their captions say; needs no weights."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.shapes import check, scene_of
from pretrain.evaluate.metric import Picture, Record, Result, Value
from pretrain.evaluate.pictures import with_prompts

if TYPE_CHECKING:
    import torch


def arguments(parser: argparse.ArgumentParser) -> None:
    """It has no options."""


def build(args: argparse.Namespace, device: torch.device) -> ShapesScorer:
    """The checker."""
    return ShapesScorer()


class ShapesScorer:
    """Compares pictures with the scenes of their captions (data_prep/shapes.py)."""

    identity: Mapping[str, Any] = {"checker": 1}
    batch = 16

    def score(self, pictures: Sequence[Picture]) -> list[Record]:
        """Whether colours and shapes are the caption's."""
        found = [
            check(p.open(), scene_of(prompt))
            for p, prompt in zip(pictures, with_prompts(pictures, "shapes"), strict=True)
        ]
        return [{"colours": result.colours, "shapes": result.shapes} for result in found]

    def summarise(self, pictures: Sequence[Picture], records: Sequence[Record]) -> Result:
        """The shares of pictures that are right."""
        return Result(
            {
                "colours": Value.mean([float(r["colours"]) for r in records]),
                "shapes": Value.mean([float(r["shapes"]) for r in records if r["shapes"] is not None]),
            }
        )
