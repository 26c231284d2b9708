"""How far an encoding is: a bar on a terminal, plain lines in a log, and the same figures in TensorBoard."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LINE_SECONDS, POINT_SECONDS = 30.0, 10.0


class Progress:
    """What this worker does, and how much of all tars, `total_bytes`, is left for all workers together."""

    def __init__(self, total_bytes: int, made_bytes: int, folder: Path):
        self._total, self._made_before, self._made = total_bytes, made_bytes, made_bytes
        self._start = self._last_line = self._last_point = time.monotonic()
        self._read = self._dropped = self._own_bytes = 0
        self._waited = 0.0
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=total_bytes, initial=made_bytes, unit="B", unit_scale=True, disable=None, dynamic_ncols=True
        )
        self._points = SummaryWriter(str(folder))

    def sample(self, dropped: bool, size: int) -> None:
        """A sample of `size` bytes was read, and perhaps dropped."""
        with self._lock:  # the reader and the encoders both tell of samples
            self._read += 1
            self._dropped += dropped
            self._own_bytes += size
            self._bar.update(size)
            now = time.monotonic()
            if now - self._last_point > POINT_SECONDS:
                self._point(now)
            if now - self._last_line > LINE_SECONDS:
                self._last_line = now
                if self._bar.disable:
                    print(self._line(now), flush=True)

    def waited(self, seconds: float) -> None:
        """The encoders waited so long for a picture."""
        self._waited += seconds

    def made(self, total: int) -> None:
        """The tars that are whole by now, of all workers, have `total` bytes."""
        self._made = total

    def say(self, line: str) -> None:
        """A line beside the bar."""
        tqdm.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
        if self._read:
            self._point(time.monotonic())
        self._points.close()

    @property
    def images_per_second(self) -> float:
        """Samples that this worker has read a second."""
        return self._read / max(1e-9, time.monotonic() - self._start)

    @property
    def hours_left(self) -> float:
        """At the rate at which all workers have gone on since this one began."""
        gone = max(self._made - self._made_before, self._own_bytes)
        rate = gone / max(1e-9, time.monotonic() - self._start)
        return max(0, self._total - self._made_before - gone) / max(1e-9, rate) / 3600

    def _line(self, now: float) -> str:
        share = self._dropped / max(1, self._read)
        return (
            f"{self._made / max(1, self._total):.1%} of the tars' bytes are encoded by all workers; this one has read "
            f"{self._read:,} images, dropped {share:.2%}, {self.images_per_second:.1f} images/s, "
            f"the encoders waited {self._waited / max(1e-9, now - self._start):.1%}; about {_hours(self.hours_left)} left"
        )

    def _point(self, now: float) -> None:
        self._last_point = now
        self._bar.set_postfix_str(
            f"{self.images_per_second:.1f} images/s, {self._dropped / max(1, self._read):.2%} dropped"
        )
        for tag, value in (
            ("images_per_s", self.images_per_second),
            ("dropped_share", self._dropped / max(1, self._read)),
            ("encoders_waited_share", self._waited / max(1e-9, now - self._start)),
            ("hours_left", self.hours_left),
            ("memory_gib", _resident_bytes() / 2**30),
        ):
            self._points.add_scalar(f"encode/{tag}", value, self._read)


def _resident_bytes() -> int:
    """Of this process, by now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"
