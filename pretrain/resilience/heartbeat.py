"""Heartbeats of a run's processes, and the judgement which of them holds up the others.

Times and heartbeats are handed in: no thread, clock or network is used here. `watchdog.py` provides those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Activity of a process inside a step: it may be waiting for a slower one, so it is suspected last.
IN_STEP = "computing and waiting for the others"
# Heartbeats that a process may be late before it counts as silent in a comparison with the others.
GRACE_BEATS = 3
MOST_SHOWN, MOST_ROWS = 8, 32


@dataclass(frozen=True)
class Heartbeat:
    """Sign of life of one process.

    Attributes:
        step: optimizer steps done.
        activity: what its main thread does.
        idle: seconds since the activity began.
        limit: seconds that the activity may take.
        time: the sender's clock in seconds, by which each heartbeat differs from the one before.
        error: the error that ended its main thread, with its exit code.
    """

    step: int
    activity: str
    idle: float
    limit: float
    time: float
    host: str
    error: str | None = None
    exit_code: int = 0


@dataclass(frozen=True)
class Peer:
    """A process as another one sees it: its last heartbeat, and when that came on the observer's clock."""

    heard_at: float
    heartbeat: Heartbeat
    started: bool = False


@dataclass(frozen=True)
class Stall:
    """Processes that hold up a run, and the evidence in words."""

    ranks: list[int]
    reason: str


class Peers:
    """The processes of a run, seen from one of them. Readers on other threads always find a consistent table.

    Args:
        size: number of processes.
        seconds: longest time without a heartbeat, or in one activity.
        startup_seconds: the same until a process has sent its first heartbeat.
        beat: seconds between heartbeats.
        now: the observer's clock in seconds.
    """

    def __init__(self, size: int, seconds: float, startup_seconds: float, beat: float, now: float):
        self.seconds, self.beat = seconds, beat
        unheard = Heartbeat(0, "not started", 0.0, startup_seconds, 0.0, "?")
        self._peers = {rank: Peer(now, unheard) for rank in range(size)}

    def __getitem__(self, rank: int) -> Peer:
        return self._peers[rank]

    def update(self, rank: int, heartbeat: Heartbeat, now: float) -> None:
        """Takes a process's heartbeat; one that was taken before is no sign of life."""
        if heartbeat != self._peers[rank].heartbeat:
            self._peers = self._peers | {rank: Peer(now, heartbeat, started=True)}

    def forgive(self, now: float) -> None:
        """Counts the silence of all processes from now on: the observer itself was stopped."""
        self._peers = {rank: replace(peer, heard_at=now) for rank, peer in self._peers.items()}

    def silent(self, limit: float, now: float, since: float = 0.0) -> list[int]:
        """Ranks without a heartbeat for more than `limit` seconds, counted from `since` at the earliest."""
        return [rank for rank, peer in self._peers.items() if now - max(peer.heard_at, since) > limit]

    def alive(self, now: float) -> list[int]:
        """Ranks whose heartbeats come on time."""
        late = self.silent(GRACE_BEATS * self.beat, now)
        return [rank for rank in self._peers if rank not in late]

    def errors(self, own_rank: int) -> list[tuple[str, int]]:
        """Errors of the other processes, a line each, with their exit codes."""
        beats = {rank: peer.heartbeat for rank, peer in self._peers.items() if rank != own_rank}
        return [
            (f"process {rank} failed: {beat.error}", beat.exit_code)
            for rank, beat in beats.items()
            if beat.error is not None
        ]

    def find_stall(self, now: float, first_step_at: float | None) -> Stall | None:
        """Finds the processes that hold up the run; None while all is well.

        Args:
            first_step_at: when the observer finished its first step. From then on no process is starting any more, whatever
                its last heartbeat says, as a step takes all processes.
        """
        beats = {rank: peer.heartbeat for rank, peer in self._peers.items()}
        overdue = {rank: beat.idle - beat.limit for rank, beat in beats.items()}
        if first_step_at is None:
            silent = [rank for rank, beat in beats.items() if rank in self.silent(beat.limit, now)]
        else:
            silent = self.silent(self.seconds, now, first_step_at)
        behind = [rank for rank in beats if overdue[rank] > 0 and beats[rank].activity != IN_STEP]
        grace = GRACE_BEATS * self.beat
        # A process inside a step is suspected where no other is, and a little later: it may have begun to wait first.
        if not silent and not behind and (stuck := [rank for rank in beats if overdue[rank] > grace]):
            silent = self.silent(grace, now)
            fewest = min(beats[rank].step for rank in stuck)
            behind = [rank for rank in stuck if beats[rank].step == fewest]
        if silent:
            silent = blame(silent)
            seconds = now - self._peers[silent[0]].heard_at
            return Stall(silent, f"{self.names(silent)} gave no sign of life for {seconds:.0f} s")
        if behind:
            limit = beats[behind[0]].limit
            return Stall(behind, f"no step for {limit:.0f} s; {self.names(behind)} held up the others")
        return None

    def names(self, ranks: list[int]) -> str:
        """Processes with their hosts, such as `process 3 on node1, 4 on node1`."""
        shown = ", ".join(f"{rank} on {self._peers[rank].heartbeat.host}" for rank in ranks[:MOST_SHOWN])
        return f"process {shown}" + (f" and {len(ranks) - MOST_SHOWN} more" if len(ranks) > MOST_SHOWN else "")

    def table(self, now: float) -> str:
        """Every process's last step, activity and silence, a line each, the longest silent first."""
        by_silence = sorted(self._peers.items(), key=lambda item: item[1].heard_at)
        lines = [
            f"  process {rank} on {peer.heartbeat.host}: {peer.heartbeat.step} steps done, "
            f"{peer.heartbeat.activity} for {peer.heartbeat.idle:.0f} s, last sign of life {now - peer.heard_at:.0f} s ago"
            for rank, peer in by_silence[:MOST_ROWS]
        ]
        return "\n".join(lines + ([f"  and {len(by_silence) - MOST_ROWS} more"] if len(by_silence) > MOST_ROWS else []))


def blame(silent: list[int]) -> list[int]:
    """Silent processes that may be at fault: without process 0, which passes heartbeats on, nobody can be heard."""
    return [0] if 0 in silent else silent
