"""Requests to stop training, and the exit code with which a job is put back into the queue.

A signal, the time limit or the end of the launcher only sets a flag here. At the end of a step all processes learn of it
(`spike_guard.py`), write a checkpoint together and end with REQUEUE. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from pretrain.distributed.launcher import LauncherWatch

# The exit code that `slurm/common.sh` turns into a requeue: EX_TEMPFAIL.
REQUEUE = 75
# A signal that comes twice within this many seconds counts once: a launcher passes on what SLURM or the terminal sent to all.
REPEAT_SECONDS = 2.0
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TIME_LIMIT, LAUNCHER_GONE = -1.0, -2.0  # causes that are no signals


class StopRequest:
    """Request to stop this process: SIGUSR1 (SLURM's --signal), SIGTERM (preemption), Ctrl-C, a terminal that was closed
    (SIGHUP, unless nohup has it ignored), the time limit, or a launcher that is gone.

    Attributes:
        limit: hours from now after which to stop; None for no limit.
    """

    def __init__(
        self,
        limit: float | None = None,
        launcher: LauncherWatch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.limit, self._launcher, self._clock, self._start = limit, launcher, clock, clock()
        self._signal: signal.Signals | None = None
        self._received = 0.0
        self._process = os.getpid()
        self._handlers = {number: signal.signal(number, self._handle) for number in heard_signals()}

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
        """Cause as a number: 0 for no request, a signal's number, TIME_LIMIT or LAUNCHER_GONE."""
        if self._signal is not None:
            return float(self._signal)
        if self.limit is not None and self._clock() - self._start > self.limit * 3600:
            return TIME_LIMIT
        return LAUNCHER_GONE if self._launcher is not None and self._launcher.gone else 0.0

    def close(self) -> None:
        """Restores the earlier signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def heard_signals() -> list[signal.Signals]:
    """The signals that ask to stop: SIGNALS, without a SIGHUP that nohup has ignored."""
    return [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def reason(code: float) -> str:
    """A `StopRequest.code` in words."""
    words = {TIME_LIMIT: "the time limit (checkpoint.time_limit)", LAUNCHER_GONE: "the end of its launcher"}
    return words.get(code) or signal.Signals(int(code)).name
