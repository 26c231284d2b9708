"""Watchdog: ends all processes within a set time when one of them dies or stops making progress, and names it.

Each process posts a heartbeat from a thread of its own and reads those of the others. Gloo and NCCL notice some deaths
themselves, but no process that is alive and stands still (SIGSTOP, a file system that hangs), and never say which one it was.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

from pretrain.distributed.store import DistError, DistNetworkError, KeyValueStore
from pretrain.distributed.world import World
from pretrain.resilience.heartbeat import GRACE_BEATS, Heartbeat, Peers, Stall, blame
from pretrain.resilience.signals import REQUEUE

# Until the first step is done, in which models are compiled and loaders started, all may take this many times as long.
STARTUP_FACTOR = 6
# Heartbeats for which the main thread may find another process's error itself, before the watchdog ends the process.
ERROR_BEATS = 3

# Words in torch's errors about another process that went away, and about a loader that hangs or was killed.
COLLECTIVE_ERRORS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "gloo",
    "NCCL",
    "ncclRemoteError",
)
LOADER_ERRORS = ("DataLoader timed out", "exited unexpectedly", "is killed by signal")


class Clock(Protocol):
    """Source of time; the module `time` is one."""

    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


class Watchdog:
    """Watches all processes of a run from each of them; `start` begins the watch.

    Attributes:
        seconds: longest time without a heartbeat, or in one activity, before all processes end with REQUEUE.
        step: optimizer steps done.
    """

    def __init__(
        self,
        world: World,
        seconds: float,
        clock: Clock = time,
        connect: Callable[[float], KeyValueStore] = KeyValueStore,
    ):
        self.world, self.seconds, self.step = world, seconds, 0
        self.beat = min(seconds / 5, 5.0)
        self._clock, self._connect = clock, connect
        self._store = connect(min(seconds / 2, 30.0))
        now = clock.monotonic()
        self.peers = Peers(world.size, seconds, STARTUP_FACTOR * seconds, self.beat, now)
        self._activity, self._since = "starting", now
        self._first_step_at: float | None = None
        self._error: tuple[str, int] | None = None
        self._explaining = False  # the main thread looks for the cause of an error itself
        self._beats_with_error = 0
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> Watchdog:
        """Starts the two threads that post heartbeats and watch those of the others."""
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._post_and_read, self._watch)]
        for thread in self._threads:
            thread.start()
        return self

    def close(self) -> None:
        """Ends the watch. Every process calls it at its end."""
        self._closed.set()
        for thread in self._threads:
            thread.join(2)

    # ---- the main thread ----

    def begin(self, activity: str) -> None:
        """Notes what the main thread does from now on."""
        self._activity, self._since = activity, self._clock.monotonic()

    def finish_step(self, step: int) -> None:
        """Notes that the main thread has done this many steps."""
        self.step, self._first_step_at = step, self._first_step_at or self._clock.monotonic()

    def explain(self, error: BaseException) -> tuple[str, int]:
        """Posts an error of this process, or finds the process at fault where a collective broke.

        Returns:
            A line for the log, and the exit code: REQUEUE where another start may succeed, else 1.
        """
        self._explaining = True
        if self.world.size > 1 and _mentions(error, COLLECTIVE_ERRORS):
            return self._explain_broken_collective(error)
        code = REQUEUE if _mentions(error, LOADER_ERRORS) else 1
        self._error = (str(error), code)
        with contextlib.suppress(DistError):
            self.post(self._connect(self.beat))
        if self.world.size > 1 and self.world.rank == 0:
            self._clock.sleep(2 * self.beat)  # the store ends with process 0: the others must read this first
        return str(error), code

    def _explain_broken_collective(self, error: BaseException) -> tuple[str, int]:
        deadline = self._clock.monotonic() + 3 * self.beat + 2
        while self._clock.monotonic() < deadline and not self.peers.errors(self.world.rank):
            self._clock.sleep(self.beat / 4)
        if errors := self.peers.errors(self.world.rank):
            return errors[0]
        now = self._clock.monotonic()
        dead = blame([rank for rank in self.peers.silent(2 * self.beat, now) if rank != self.world.rank])
        what = f"{self.peers.names(dead)} died" if dead else f"the processes lost each other, all are alive ({error})"
        return f"{what}\n{self._table()}", REQUEUE

    # ---- the threads ----

    def _post_and_read(self) -> None:
        """Exchanges heartbeats. It hangs where process 0, which keeps the store, does not answer; so it decides nothing."""
        while not self._closed.wait(self.beat):
            try:
                self.post(self._store)
                self.read()
            except DistNetworkError:  # the connection broke, or process 0 is gone
                with contextlib.suppress(DistError):
                    self._store = self._connect(self._store.timeout)
            except DistError:
                continue

    def _watch(self) -> None:
        while True:
            start = self._clock.monotonic()
            if self._closed.wait(self.beat) or self._explaining:
                return
            self.check(self._clock.monotonic() - start)

    def check(self, waited: float) -> None:
        """Ends this process where another one failed or the run stalls.

        Args:
            waited: seconds since the check before; far more than a beat where this process itself was stopped.
        """
        if waited > 3 * self.beat:
            self._since = self._clock.monotonic()
            self.peers.forgive(self._since)
        errors = self.peers.errors(self.world.rank)
        self._beats_with_error = self._beats_with_error + 1 if errors else 0
        if self._beats_with_error > ERROR_BEATS:  # NCCL, unlike gloo, lets this process's main thread wait on
            line, code = errors[0]
            print(f"train: process {self.world.rank}: {line}", file=sys.stderr, flush=True)
            os._exit(code)
        if stall := self.peers.find_stall(self._clock.monotonic(), self._first_step_at):
            self._end(stall)

    def _end(self, stall: Stall) -> None:
        """Ends this process, whatever its main thread does. The first one alive reports; one at fault shows its traceback."""
        alive = self.peers.alive(self._clock.monotonic())
        reports = not alive or self.world.rank == alive[0]
        if reports:
            print(f"watchdog: {stall.reason}; all processes end\n{self._table()}", file=sys.stderr, flush=True)
        if self.world.rank in stall.ranks:
            print(f"watchdog: where process {self.world.rank} is:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
        # The launcher ends all with the first exit, and the one that reports may notice the stall a beat later.
        self._clock.sleep(1 if reports else GRACE_BEATS * self.beat)
        os._exit(REQUEUE)

    # ---- heartbeats ----

    def heartbeat(self) -> Heartbeat:
        """This process's heartbeat of now."""
        now = self._clock.monotonic()
        limit = self.seconds * (STARTUP_FACTOR if self._first_step_at is None else 1)
        error, code = self._error or (None, 0)
        host = socket.gethostname()
        return Heartbeat(self.step, self._activity, now - self._since, limit, now, host, error, code)

    def post(self, store: KeyValueStore) -> None:
        """Posts this process's heartbeat."""
        store.set(f"alive/{self.world.rank}", asdict(self.heartbeat()))

    def read(self) -> None:
        """Reads the heartbeats of all processes that have sent one."""
        ranks = range(self.world.size)
        started = [r for r in ranks if self.peers[r].started or self._store.has(f"alive/{r}")]
        for rank, content in zip(started, self._store.get_all([f"alive/{r}" for r in started]), strict=True):
            self.peers.update(rank, Heartbeat(**content), self._clock.monotonic())

    def _table(self) -> str:
        now = self._clock.monotonic()
        self.peers.update(self.world.rank, self.heartbeat(), now)
        return self.peers.table(now)


def _mentions(error: BaseException, words: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
