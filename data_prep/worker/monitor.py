"""Progress of an encoding: a bar on a terminal, plain lines in a log, and the same figures in TensorBoard."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from data_prep.common.progress import LOG_SECONDS, Progress

POINT_SECONDS = 10.0  # between two points of a curve in TensorBoard


class EncodingMonitor:
    """Counts this worker's samples, and the bytes of the tars that all workers together have encoded."""

    def __init__(self, total_bytes: int, encoded_bytes: int, folder: Path):
        """Starts with `encoded_bytes` of all tars' `total_bytes` encoded before; `folder` is for TensorBoard's files."""
        self._total, self._encoded_before, self._encoded = total_bytes, encoded_bytes, encoded_bytes
        self._start = self._last_point = time.monotonic()
        self._read = self._dropped = self._own_bytes = 0
        self._shown = encoded_bytes  # by the bar
        self._waited = 0.0
        self._lock = threading.Lock()
        self._progress = Progress(
            total_bytes, "B", done=encoded_bytes, line_seconds=LOG_SECONDS, line=self._line, scale=True
        )
        self._writer = SummaryWriter(str(folder))

    def count_sample(self, dropped: bool, size: int) -> None:
        """Counts a sample that was read, with a picture of `size` bytes, and perhaps dropped."""
        with self._lock:  # called by the reader's thread and by the encoders'
            self._read += 1
            self._dropped += dropped
            self._own_bytes += size
            self._move_bar()
            if time.monotonic() - self._last_point > POINT_SECONDS:
                self._write_point()

    def count_waiting(self, seconds: float) -> None:
        """Adds the time that the encoders waited for a picture."""
        self._waited += seconds

    def set_encoded(self, encoded_bytes: int) -> None:
        """Sets the bytes of the tars that are encoded by now, by all workers."""
        with self._lock:
            self._encoded = encoded_bytes
            self._move_bar()

    def finish_tar(self, rest: int) -> None:
        """Counts what a tar that was read has beside the pictures, in bytes: captions, headers, padding."""
        with self._lock:
            self._own_bytes += rest
            self._move_bar()

    def _move_bar(self) -> None:
        """To what all workers have encoded, or what this one has read beyond."""
        reached = max(self._encoded, self._encoded_before + self._own_bytes)
        self._progress.update(max(0, reached - self._shown))
        self._shown = max(reached, self._shown)

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._progress.say(line)

    def close(self) -> None:
        """Ends the bar, and the curves with a last point."""
        self._progress.close()
        if self._read:
            self._write_point()
        self._writer.close()

    @property
    def images_per_second(self) -> float:
        """Samples that this worker has read, a second."""
        return self._read / max(1e-9, time.monotonic() - self._start)

    @property
    def hours_left(self) -> float:
        """Hours until all tars are encoded, at the rate of all workers since this one began."""
        encoded = max(self._encoded - self._encoded_before, self._own_bytes)
        rate = encoded / max(1e-9, time.monotonic() - self._start)
        return max(0, self._total - self._encoded_before - encoded) / max(1e-9, rate) / 3600

    @property
    def dropped_share(self) -> float:
        """Share of this worker's samples that were dropped, 0 to 1."""
        return self._dropped / max(1, self._read)

    @property
    def waited_share(self) -> float:
        """Share of the time in which the encoders waited for pictures, 0 to 1."""
        return self._waited / max(1e-9, time.monotonic() - self._start)

    def _line(self) -> str:
        return (
            f"{self._encoded / max(1, self._total):.1%} of the tars' bytes are encoded by all workers; this one has read "
            f"{self._read:,} images, dropped {self.dropped_share:.2%}, {self.images_per_second:.1f} images/s, "
            f"the encoders waited {self.waited_share:.1%}; about {_duration(self.hours_left)} left"
        )

    def _write_point(self) -> None:
        self._last_point = time.monotonic()
        self._progress.note(f"{self.images_per_second:.1f} images/s, {self.dropped_share:.2%} dropped")
        for tag, value in (
            ("images_per_s", self.images_per_second),
            ("dropped_share", self.dropped_share),
            ("encoders_waited_share", self.waited_share),
            ("hours_left", self.hours_left),
            ("memory_gib", _resident_bytes() / 2**30),
        ):
            self._writer.add_scalar(f"encode/{tag}", value, self._read)


def _resident_bytes() -> int:
    """The memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"
