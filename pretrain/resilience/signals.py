"""When training is asked to stop, and how a process ends so that its job is started again.

A signal or the limit of time only leaves a note here; all processes agree on it at the end of a step (`guard.py`), write a
checkpoint together and end with REQUEUE. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

# The exit code that `slurm/common.sh` turns into a requeue: EX_TEMPFAIL.
REQUEUE = 75
# Seconds within which a signal that comes twice is one: a launcher passes on what the terminal or SLURM sent to all.
TWICE = 2.0
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Stop:
    """What asked this process to stop: SIGUSR1 (SLURM's --signal), SIGTERM (preemption), Ctrl-C, or the limit of time.

    Attributes:
        limit: hours after which to stop, counted from now; None for no limit.
    """

    def __init__(self, limit: float | None = None):
        self._signal: signal.Signals | None = None
        self._taken = 0.0
        self._process = os.getpid()
        self.limit, self._since = limit, time.monotonic()
        self._before = {number: signal.signal(number, self._take) for number in SIGNALS}

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's process, which its parent ends
            return
        if self._signal is not None and time.monotonic() - self._taken > TWICE:
            print(f"a second signal ({signal.Signals(number).name}): stopping at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        if self._signal is None:
            self._signal, self._taken = signal.Signals(number), time.monotonic()

    @property
    def code(self) -> float:
        """Why: 0 for no reason, a signal's number, or -1 for the limit of time."""
        if self._signal is not None:
            return float(self._signal)
        return -1.0 if self.limit is not None and time.monotonic() - self._since > self.limit * 3600 else 0.0

    def close(self) -> None:
        """Lets signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def reason(code: float) -> str:
    """A stop's code in words."""
    return "the limit of time (checkpoint.time_limit)" if code < 0 else signal.Signals(int(code)).name
