"""Progress of a long command: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

LOG_SECONDS = 30.0  # between two lines of a command that runs for hours


class Progress:
    """Counts the items that are done; several threads may do so. For use as a context, or with `close`."""

    def __init__(
        self,
        total: int,
        unit: str,
        *,
        done: int = 0,
        line_seconds: float = 0.0,
        line: Callable[[], str] | None = None,
        scale: bool = False,
        delay: float = 0.0,
    ):
        """Starts the bar, or nothing where there is no terminal.

        Args:
            total: items in all.
            unit: an item's name in the singular, such as "picture".
            done: items that were done before, and do not count for the rate.
            line_seconds: the least time between two lines in a log; 0 is a line after each update.
            line: gives a log's line instead of "3 of 10 pictures, 1.5 pictures/s, about 0 min left".
            scale: shows numbers on the bar with k, M, G.
            delay: seconds before the bar is shown.
        """
        self._total, self._unit, self._before, self._done = total, unit, done, done
        self._line, self._line_seconds = line or self._counts, line_seconds
        self._start = self._last_line = time.monotonic()
        self._lock = threading.Lock()
        bar_unit = unit if scale else f" {unit}s"
        self._bar = tqdm(
            total=total, initial=done, unit=bar_unit, unit_scale=scale, disable=None, dynamic_ncols=True, delay=delay
        )

    def update(self, count: int = 1) -> None:
        """Counts `count` more items as done."""
        with self._lock:
            self._done += count
            self._bar.update(count)
            now = time.monotonic()
            if self._bar.disable and now - self._last_line >= self._line_seconds:
                self._last_line = now
                print(self._line(), flush=True)

    def note(self, words: str) -> None:
        """Shows some words behind the bar, until the next ones; nothing in a log."""
        self._bar.set_postfix_str(words)

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        tqdm.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _counts(self) -> str:
        rate = (self._done - self._before) / max(1e-9, time.monotonic() - self._start)
        minutes = max(0, self._total - self._done) / max(1e-9, rate) / 60
        units = f"{self._unit}s"
        pace = f"{rate:.1f} {units}/s" if rate >= 0.1 else f"{1 / max(1e-9, rate) / 60:.1f} min each"
        return f"{self._done} of {self._total} {units}, {pace}, about {minutes:.0f} min left"
