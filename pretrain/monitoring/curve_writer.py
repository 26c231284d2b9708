"""Points of a run's curves on disk: TensorBoard's event files with named panels, and the same scalars in metrics.jsonl.

Process 0 writes. A resumed run goes on at its checkpoint's step: in both, points after it are removed. On a full disk points
are lost but training goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars

from pretrain.monitoring.panels import PANELS
from pretrain.state import json_number

METRICS = "metrics.jsonl"
LAYOUT = {panel: {title: ["Multiline", tags] for title, tags in charts.items()} for panel, charts in PANELS.items()}


class CurveWriter:
    """Writes points of curves, and pictures.

    Args:
        about: text on the run, shown by TensorBoard under its title.
        writes: False for processes that write nothing.
    """

    def __init__(self, run_dir: Path, about: dict[str, str], writes: bool):
        self.about, self.writes = about, writes
        self.metrics, self._folder = run_dir / METRICS, run_dir / "tensorboard"
        self._events: SummaryWriter | None = None

    def resume(self, step: int) -> None:
        """Continues after a step; later points are removed, at step 0 all of them. Panels and text are written anew.

        They stand at the step after it, so that another resume removes them too.
        """
        self.close()
        if not self.writes:
            return
        # In a run's first file, too: TensorBoard removes points from a run's second such mark on.
        self._events = self._open(purge_step=step + 1 if step else 0)
        self._put(lambda events: self._describe(events, step + 1))
        if self.metrics.exists():
            drop_later_lines(self.metrics, step)

    def _describe(self, events: SummaryWriter, step: int) -> None:
        files: Any = events.file_writer  # SummaryWriter.add_custom_scalars takes no step
        files.add_summary(custom_scalars(LAYOUT), step)
        for title, text in self.about.items():
            events.add_text(title, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Writes a point of each curve, and a line of metrics.jsonl."""

        def write(events: SummaryWriter) -> None:
            for tag, value in values.items():
                events.add_scalar(tag, value, step)

        self._put(write)
        if self.writes:
            numbers = {tag: json_number(value) for tag, value in values.items()}
            self._append(json.dumps({"step": step, "time": round(time.time(), 3), **numbers}) + "\n")

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """Writes a picture."""
        self._put(lambda events: events.add_image(tag, np.asarray(image), step, dataformats="HWC"))

    def flush(self) -> None:
        """Writes all points to disk."""
        self._put(lambda events: events.flush())

    def close(self) -> None:
        """Closes the event file."""
        if self._events is not None:
            self._put(lambda events: events.close())
        self._events = None

    def _open(self, purge_step: int | None = None) -> SummaryWriter:
        return SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=10)

    def _put(self, write: Callable[[SummaryWriter], object]) -> None:
        """Writes to the event file; after a failure the next point tries a new file."""
        if not self.writes:
            return
        try:
            self._events = self._events or self._open()
            write(self._events)
        except OSError as error:
            print(
                f"WARNING: TensorBoard's file cannot be written ({error}); its points are lost until it can", flush=True
            )
            self._events = None

    def _append(self, line: str) -> None:
        """Appends a whole line to metrics.jsonl, or nothing."""
        try:
            before = self.metrics.stat().st_size if self.metrics.exists() else 0
            try:
                with self.metrics.open("a") as file:
                    file.write(line)
            except OSError:
                if self.metrics.exists():
                    os.truncate(self.metrics, before)
                raise
        except OSError as error:
            print(f"WARNING: {self.metrics} cannot be written ({error}); its points are lost until it can", flush=True)


def drop_later_lines(path: Path, step: int) -> None:
    """Cuts a metrics.jsonl before its first line of a later step, or that a killed process left incomplete; at step 0 all."""
    kept = 0
    with path.open("rb+") as file:
        for line in file:
            if not step or not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept += len(line)
        file.truncate(kept)
