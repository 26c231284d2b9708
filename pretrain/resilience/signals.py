"""Requests to stop training, and the exit code with which a job is put back into the queue.

A signal or the time limit only sets a flag here. At the end of a step all processes learn of it (`spike_guard.py`), write a
checkpoint together and end with REQUEUE. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

# The exit code that `slurm/common.sh` turns into a requeue: EX_TEMPFAIL.
REQUEUE = 75
# A signal that comes twice within this many seconds counts once: a launcher passes on what SLURM or the terminal sent to all.
REPEAT_SECONDS = 2.0
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Request to stop this process: SIGUSR1 (SLURM's --signal), SIGTERM (preemption), Ctrl-C, or the time limit.

    Attributes:
        limit: hours from now after which to stop; None for no limit.
    """

    def __init__(self, limit: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.limit, self._clock, self._start = limit, clock, clock()
        self._signal: signal.Signals | None = None
        self._received = 0.0
        self._process = os.getpid()
        self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's process, which its parent ends
            return
        if self._signal is not None and self._clock() - self._received > REPEAT_SECONDS:
            print(f"a second signal ({signal.Signals(number).name}): stopping at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        if self._signal is None:
            self._signal, self._received = signal.Signals(number), self._clock()

    @property
    def code(self) -> float:
        """Cause as a number: 0 for no request, a signal's number, or -1 for the time limit."""
        if self._signal is not None:
            return float(self._signal)
        return -1.0 if self.limit is not None and self._clock() - self._start > self.limit * 3600 else 0.0

    def close(self) -> None:
        """Restores the earlier signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def reason(code: float) -> str:
    """A `StopRequest.code` in words."""
    return "the time limit (checkpoint.time_limit)" if code < 0 else signal.Signals(int(code)).name
