"""Curves of TensorBoard, read back from event files."""

from __future__ import annotations

from pathlib import Path


def curve(folder: Path, tag: str) -> dict[int, float]:
    """The values of a curve in folder/tensorboard, by step; of a step that was written again the last. {} where there is none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # late: it takes a second

    if not (folder / "tensorboard").is_dir():
        return {}
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {e.step: e.value for e in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}
