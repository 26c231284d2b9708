"""geneval: GenEval's six tasks: whether a detector finds what the prompt asks for, in the paper's Table 2 form."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from data_prep.common.paths import path_or_url
from pretrain.evaluate.geneval_rules import TASKS, Detection, Spec, faults, kept, spec_of
from pretrain.evaluate.metric import NotRun, Picture, Record, Result, Value
from pretrain.evaluate.pictures import prompts_of
from pretrain.evaluate.records import fingerprint

if TYPE_CHECKING:
    import torch

    from pretrain.evaluate.geneval_models import ColourClassifier, Detector

PER_PROMPT = 4  # as published


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the detector and the CLIP."""
    parser.add_argument("--geneval-detector", type=path_or_url, help="Mask2Former: folder or name on the hub")
    parser.add_argument("--geneval-clip", type=path_or_url, help="CLIP of the colours: folder or name on the hub")


def check_prompts(args: argparse.Namespace) -> None:
    """Raises ValueError for prompts that are not GenEval's."""
    if args.prompts is None:
        raise ValueError("--prompts: geneval needs GenEval's evaluation_metadata.jsonl")
    for entry in prompts_of(args.prompts):
        spec_of(entry, entry["prompt"])


def build(args: argparse.Namespace, device: torch.device) -> GenevalScorer:
    """The scorer. Raises NotRun without detector or CLIP."""
    from pretrain.evaluate.clip import Clip
    from pretrain.evaluate.geneval_models import ClipColours, Mask2Former

    if args.geneval_detector is None:
        raise NotRun("no detector; give --geneval-detector FOLDER, a Mask2Former that was trained on COCO's instances")
    entries = prompts_of(args.prompts)
    specs = [spec_of(entry, entry["prompt"]) for entry in entries]
    colours = ClipColours(Clip(args.geneval_clip, "--geneval-clip", device))
    return GenevalScorer(Mask2Former(args.geneval_detector, device), colours, specs, fingerprint(entries))


class GenevalScorer:
    """Judges pictures by GenEval's rules."""

    batch = 8

    def __init__(self, detector: Detector, colours: ColourClassifier, specs: Sequence[Spec], prompts: str):
        """Args: prompts: hash of their lines. Raises ValueError for classes that the detector does not know."""
        if unknown := {label for spec in specs for label in spec.labels} - detector.labels:
            raise ValueError(
                f"the detector does not know {', '.join(sorted(unknown))}; give one that was trained on COCO's instances, or "
                "leave out the prompts that ask for them"
            )
        self._detector, self._colours = detector, colours
        self.identity: Mapping[str, Any] = {
            "rules": 1,
            "detector": detector.identity,
            "colours": colours.identity,
            "prompts": prompts,
        }

    def score(self, pictures: Sequence[Picture]) -> list[Record]:
        """Judges pictures: a record lists what differs from the prompt, and the number of objects found by class."""
        return [self._judge(picture) for picture in pictures]

    def _judge(self, picture: Picture) -> Record:
        from pretrain.evaluate.geneval_models import crop

        spec, image = spec_of(picture.about, picture.prompt), picture.open()

        def colours(objects: Sequence[Detection], label: str) -> list[str]:
            return self._colours.colours([crop(image, o) for o in objects], label)

        found = kept(self._detector.detect(image), spec.task)
        wrong = faults(spec, found, colours)
        return {"task": spec.task, "wrong": wrong, "found": {label: len(objects) for label, objects in found.items()}}

    def summarise(self, pictures: Sequence[Picture], records: Sequence[Record]) -> Result:
        """The share of right pictures in each task; overall the mean over the tasks."""
        by_task = {task: [float(not r["wrong"]) for r in records if r["task"] == task] for task in TASKS.values()}
        tasks = {task: Value.mean(right) for task, right in by_task.items() if right}
        overall = Value(fmean(value.value for value in tasks.values()), len(records))
        prompts = {p.prompt for p in pictures}
        notes = {
            "tasks without prompts": [task for task, right in by_task.items() if not right],
            "pictures of a prompt": len(pictures) / len(prompts),
            "pictures of a prompt, published": PER_PROMPT,
        }
        return Result({"overall": overall, **tasks}, notes)
