"""Curves of TensorBoard, read back from event files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def curves(folder: Path, tags: Iterable[str]) -> dict[str, dict[int, float]]:
    """Reads curves from folder/tensorboard: values by step, by tag; tags that are not there are left out.

    A step that was written several times has its last value.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # late: it takes a second

    if not (folder / "tensorboard").is_dir():
        return {}
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    there = events.Tags()["scalars"]
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags if tag in there}


def curve(folder: Path, tag: str) -> dict[int, float]:
    """The values of one curve by step; {} where there is none."""
    return curves(folder, [tag]).get(tag, {})
