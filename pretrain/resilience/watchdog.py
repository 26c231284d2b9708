"""Never a silent hang: all processes end within a set time when one of them dies or no longer moves.

Each process posts a sign of life with its last step and what it is doing, from a thread of its own, and reads those of the
others. Gloo and NCCL notice some deaths by themselves, none that leaves a process there but still (SIGSTOP, a file system
that hangs), and never say whose it was.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from pretrain.distributed.store import DistError, DistNetworkError, KeyValueStore
from pretrain.distributed.world import World
from pretrain.resilience.signals import REQUEUE


@dataclass
class Seen:
    """What is known here of a process; `changed` is when its last sign of life came, on this process's clock."""

    changed: float
    note: dict[str, Any]


class Watchdog:
    """Watches all processes of a run from each of them.

    Attributes:
        seconds: so long a process may give no sign of life, or stay at one thing, before all end with REQUEUE.
        step: the number of steps done.
    """

    def __init__(self, world: World, seconds: float):
        self.world, self.seconds = world, seconds
        self._beat = min(seconds / 5, 5.0)
        self._board = KeyValueStore(timeout=min(seconds / 2, 30.0))
        self.step, self._doing = 0, "starting"
        self._begun: float | None = None  # when the first step was done
        self._failed: dict[str, str | int] = {}
        self._failing = False  # the main thread looks for the cause itself
        self._seen: dict[int, Seen] = {}
        self._forget_time()
        self._done = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._watch)]
        for thread in self._threads:
            thread.start()

    def at(self, doing: str) -> None:
        """The main thread begins to do this."""
        self._doing, self._since = doing, time.monotonic()

    def done(self, step: int) -> None:
        """The main thread has done this step."""
        self.step, self._begun = step, self._begun or time.monotonic()

    def close(self) -> None:
        """Ends the watch. All processes call it at their end."""
        self._done.set()
        for thread in self._threads:
            thread.join(2)

    def failed(self, error: BaseException) -> tuple[str, int]:
        """After an error here: posts it, and says for a broken collective whose fault it was.

        Returns:
            One line for the log, and this process's exit code: REQUEUE where another start may go well, and 1 else.
        """
        self._failing = True
        if self.world.size == 1 or not _says(error, OF_COLLECTIVES):
            code = REQUEUE if _says(error, OF_LOADERS) else 1
            self._failed = {"failed": str(error), "code": code}
            with contextlib.suppress(DistError):
                self._post(KeyValueStore(self._beat))
            if self.world.size > 1 and self.world.rank == 0:
                time.sleep(2 * self._beat)  # who keeps the board leaves last, so that the others can read this
            return str(error), code
        deadline = time.monotonic() + 3 * self._beat + 2
        while time.monotonic() < deadline and not self._causes():
            time.sleep(self._beat / 4)
        if causes := self._causes():
            return causes[0]
        silent = [r for r in self._silent(2 * self._beat) if r != self.world.rank]
        gone = [0] if 0 in silent else silent  # without process 0 nothing is heard of the others
        what = f"{self._names(gone)} died" if gone else f"the processes lost each other, though all are alive ({error})"
        return f"{what}\n{self.table()}", REQUEUE

    def _causes(self) -> list[tuple[str, int]]:
        """The errors that other processes had of their own, each with its exit code."""
        notes = {r: seen.note for r, seen in self._seen.items() if "failed" in seen.note and r != self.world.rank}
        return [(f"process {r} failed: {note['failed']}", note["code"]) for r, note in notes.items()]

    def table(self) -> str:
        """Each process's last step, what it was doing, and for how long it has given no sign of life; the stillest first."""
        now, own = time.monotonic(), self.world.rank
        by_silence = sorted(
            (self._seen | {own: Seen(time.monotonic(), self._mine())}).items(), key=lambda s: s[1].changed
        )
        lines = [
            f"  process {rank} on {seen.note.get('host', '?')}: {seen.note.get('step', 0)} steps done, "
            f"{seen.note.get('doing', 'not started')} for {seen.note.get('idle', 0):.0f} s, "
            f"last sign of life {now - seen.changed:.0f} s ago"
            for rank, seen in by_silence[:32]
        ]
        return "\n".join(lines + ([f"  and {len(by_silence) - 32} more"] if len(by_silence) > 32 else []))

    # ---- the threads ----

    def _talk(self) -> None:
        """Posts and reads. It stands still where process 0, who keeps the board, does not answer; so it decides nothing."""
        while not self._done.wait(self._beat):
            try:
                self._post(self._board)
                self._look()
            except DistNetworkError:  # the connection broke, or process 0 is gone
                with contextlib.suppress(DistError):
                    self._board = KeyValueStore(self._board.timeout)
            except DistError:
                continue

    def _watch(self) -> None:
        told = 0  # beats since another process told of an error
        while True:
            start = time.monotonic()
            if self._done.wait(self._beat) or self._failing:
                return
            if time.monotonic() - start > 3 * self._beat:
                self._forget_time()  # this process itself was stopped, perhaps with all the others
            told = told + 1 if self._causes() else 0
            if told > 3:  # NCCL, unlike gloo, does not let this process's main thread know
                line, code = self._causes()[0]
                print(f"train: process {self.world.rank}: {line}", file=sys.stderr, flush=True)
                os._exit(code)
            whose, why = self._at_fault()
            if whose:
                self._end(whose, why)

    def _forget_time(self) -> None:
        now = time.monotonic()
        self._since = now
        self._seen = {r: Seen(now, self._seen[r].note if r in self._seen else {}) for r in range(self.world.size)}

    def _mine(self) -> dict[str, Any]:
        """A sign of life; its time makes each differ from the one before."""
        now = time.monotonic()
        limit = self.seconds * (STARTING if self._begun is None else 1)
        note = {"step": self.step, "doing": self._doing, "idle": now - self._since, "limit": limit, "at": now}
        return note | {"host": socket.gethostname()} | self._failed

    def _post(self, board: KeyValueStore) -> None:
        board.set(f"alive/{self.world.rank}", self._mine())

    def _look(self) -> None:
        there = [r for r, seen in self._seen.items() if seen.note or self._board.has(f"alive/{r}")]
        for rank, note in zip(there, self._board.get_all([f"alive/{r}" for r in there]), strict=True):
            if note != self._seen[rank].note:
                self._seen = self._seen | {rank: Seen(time.monotonic(), note)}

    def _silent(self, limit: float, since: float = 0.0) -> list[int]:
        """Who gave no sign of life for so many seconds, of those after `since` on this process's clock."""
        now = time.monotonic()
        return [rank for rank, seen in self._seen.items() if now - max(seen.changed, since) > limit]

    def _at_fault(self) -> tuple[list[int], str]:
        """Who holds up the others, and how that shows; nobody while all is well."""
        notes = {rank: seen.note for rank, seen in self._seen.items()}
        limits = {rank: note.get("limit", STARTING * self.seconds) for rank, note in notes.items()}
        over = {rank: note.get("idle", 0.0) - limits[rank] for rank, note in notes.items()}
        if self._begun is None:
            silent = [r for r in notes if r in self._silent(limits[r])]
        else:  # one step takes all processes: nobody is starting any more, whatever his last sign of life says
            silent = self._silent(self.seconds, self._begun)
        behind = [r for r in notes if over[r] > 0 and notes[r]["doing"] != WAITING]
        # Who waits is only told of where nobody else is: a little later, as he may have begun to wait before.
        if not silent and not behind and (still := [r for r in notes if over[r] > GRACE * self._beat]):
            silent = self._silent(GRACE * self._beat)
            fewest = min(notes[r]["step"] for r in still)
            behind = [r for r in still if notes[r]["step"] == fewest]
        if silent:
            silent = [0] if 0 in silent else silent  # without process 0 nothing is heard of the others
            seconds = time.monotonic() - self._seen[silent[0]].changed
            return silent, f"{self._names(silent)} gave no sign of life for {seconds:.0f} s"
        if not behind:
            return [], ""
        return behind, f"no step for {limits[behind[0]]:.0f} s; {self._names(behind)} held up the others"

    def _names(self, ranks: list[int]) -> str:
        shown = ", ".join(f"{r} on {self._seen[r].note.get('host', '?')}" for r in ranks[:8])
        return f"process {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def _end(self, whose: list[int], why: str) -> None:
        """Ends this process, whatever its main thread is in. The first one alive tells why, and who is at fault where it is."""
        alive = [r for r in self._seen if r not in self._silent(GRACE * self._beat)]
        teller = not alive or self.world.rank == alive[0]
        if teller:
            print(f"watchdog: {why}; all processes end\n{self.table()}", file=sys.stderr, flush=True)
        if self.world.rank in whose:
            print(f"watchdog: where process {self.world.rank} is:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
        # Who tells may notice a beat later, and needs the others' last words; the launcher ends all with the first.
        time.sleep(1 if teller else GRACE * self._beat)
        os._exit(REQUEUE)


# Times as long as later until the first step is done, in which models are compiled and loaders started.
STARTING = 6
GRACE = 3  # beats
WAITING = "computing and waiting for the others"


# What torch says of another process that went away, and of a loader that stands still or was killed.
OF_COLLECTIVES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "gloo",
    "NCCL",
    "ncclRemoteError",
)
OF_LOADERS = ("DataLoader timed out", "exited unexpectedly", "is killed by signal")


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
