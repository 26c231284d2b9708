"""The pictures of an evaluation: drawn from a run or a model, or those of a folder.

A prompts file ending in .jsonl holds an object a line: its `prompt`, and whatever a metric needs besides (docs/evaluation.md).
One ending in .csv is DPG-Bench's. Any other holds a prompt a line. Of each prompt `--per-prompt` pictures are drawn, one after
the other, each from the next seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.evaluate.metric import Picture
from pretrain.evaluate.questions import read_dpg_csv
from pretrain.sampling.jobs import read_description
from pretrain.sampling.prompts import read_prompts

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class PictureSet:
    """The pictures that are judged.

    Attributes:
        mine: the places of those that this process judges.
        missing: the number of those that other processes have still to draw.
        origin: the run or model, and the settings that all were drawn with; {} for pictures of other origin.
        list_again: makes the set anew where pictures are missing.
    """

    pictures: list[Picture]
    mine: Sequence[int]
    missing: int
    origin: Mapping[str, Any]
    list_again: Callable[[], PictureSet] | None = None

    def completed(self) -> PictureSet:
        """This set with what other processes have drawn meanwhile."""
        return self.list_again() if self.missing and self.list_again else self

    @property
    def sha256(self) -> str:
        """The hash of the pictures' hashes and prompts in order; metrics with the same one judged the same set."""
        lines = "".join(f"{p.sha256} {p.prompt}\n" for p in self.pictures)
        return hashlib.sha256(lines.encode()).hexdigest()


def prompts_of(path: Path) -> list[dict[str, Any]]:
    """The prompts of a file, each with its `prompt` and its other fields. Raises ValueError with the line that is wrong."""
    if path.suffix == ".csv":
        return read_dpg_csv(path)
    if path.suffix != ".jsonl":
        return [{"prompt": prompt} for prompt in read_prompts(path)]
    entries = []
    for number, line in enumerate(read_prompts(path), 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: prompt {number} is no JSON ({error})") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(
                f'{path}: prompt {number} must be an object with a "prompt", such as {{"prompt": "a cat"}}'
            )
        entries.append(entry)
    return entries


def draw(args: argparse.Namespace) -> PictureSet:
    """Draws this process's missing pictures into OUT/pictures; its share is every N-th of N processes'."""
    from pretrain.sampling.drawing import (  # late: the libraries take seconds
        draw_share,
        share_of_process,
    )

    if args.prompts is None:
        raise ValueError("--prompts: needed to draw pictures; give a file of prompts")
    entries = [entry for entry in prompts_of(args.prompts) for _ in range(args.per_prompt)]
    folder = args.out / "pictures"
    drawn = draw_share(argparse.Namespace(**vars(args) | {"out": folder}), [entry["prompt"] for entry in entries])
    rank, processes = share_of_process()

    def listed() -> PictureSet:
        there = [job for job in drawn.jobs if job.picture(folder).is_file()]
        return PictureSet(
            [_picture(job.picture(folder), entries[job.index], job.seed) for job in there],
            [place for place, job in enumerate(there) if job.index % processes == rank],
            len(drawn.jobs) - len(there),
            drawn.origin | drawn.jobs[0].settings,
            listed,
        )

    return listed()


def of_folder(folder: Path, prompts: Path | None, per_prompt: int, option: str = "--pictures") -> PictureSet:
    """The pictures of a folder, in the order of their names.

    Their prompts are those of a file, each for `per_prompt` pictures; without a file those that `pretrain.sample` left in them.

    Args:
        option: the option that names the folder.

    Raises:
        ValueError: the folder holds no pictures, or another number of them than the prompts ask for.
    """
    from pretrain.sampling.drawing import share_of_process

    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {folder}: no such folder")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and not p.stem.endswith("_masks"))
    paths = [p for p in paths if p.name != "grid.png"]
    if not paths:
        raise ValueError(f"{option} {folder}: holds no pictures ({', '.join(ENDINGS)})")
    entries: list[Mapping[str, Any]] = [{}] * len(paths)
    if prompts is not None:
        entries = [entry for entry in prompts_of(prompts) for _ in range(per_prompt)]
        if len(entries) != len(paths):
            raise ValueError(
                f"{folder} holds {len(paths)} pictures, but {prompts} asks for {len(entries)} "
                f"({per_prompt} a prompt): give the prompts of these pictures, or another --per-prompt"
            )
    pictures = [_picture(path, entry) for path, entry in zip(paths, entries, strict=True)]
    rank, processes = share_of_process()
    return PictureSet(pictures, range(rank, len(pictures), processes), 0, {"pictures": str(folder)})


def _picture(path: Path, entry: Mapping[str, Any], seed: int | None = None) -> Picture:
    description = {} if entry else read_description(path) or {}
    about = {key: value for key, value in entry.items() if key != "prompt"}
    prompt = entry.get("prompt", description.get("prompt"))
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    return Picture(path, content, prompt, description.get("seed", seed), about)


def with_prompts(pictures: Sequence[Picture], metric: str) -> list[str]:
    """The pictures' prompts. Raises ValueError for a picture without one."""
    for picture in pictures:
        if picture.prompt is None:
            raise ValueError(f"{metric}: {picture.path.name} has no prompt; give --prompts, or leave {metric} out")
    return [str(picture.prompt) for picture in pictures]
