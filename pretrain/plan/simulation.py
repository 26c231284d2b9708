"""Training steps and whole runs simulated event by event: the work of each process, the collectives that join them, failures.

A step of N processes: each computes its micro-batches; in the last backward pass the buckets of gradients become complete one
after another. A bucket is reduced once all processes have completed it and the one before is reduced; with `overlap` while the
backward pass goes on, else after it. Then the partitions' sums are exchanged, the gradient's norm is agreed on, each process
updates its share, and the weights are gathered. Nothing else is exchanged, so a step is as slow as its slowest process.

Collectives are rings: N - 1 hops, and (N - 1)/N of the bytes through each GPU; over several nodes all GPUs' links to the network
carry parts of the ring at the same time.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, fields
from statistics import fmean

MOST_FAILURES = 10_000  # a run that fails more often does not get on


@dataclass(frozen=True)
class Network:
    """Links between processes.

    Attributes:
        per_node: processes of a node, at the most.
        link_gbs, network_gbs: GB/s that a process sends within its node, and to other nodes, in collectives.
        link_s, network_s: seconds of a hop within a node, and between nodes.
    """

    per_node: int
    link_gbs: float
    network_gbs: float
    link_s: float
    network_s: float

    def ring_s(self, size: float, processes: int) -> float:
        """Seconds of a reduce-scatter or an all-gather of `size` bytes in all."""
        hops, nodes = processes - 1, math.ceil(processes / self.per_node)
        rate = self.link_gbs if nodes == 1 else min(self.link_gbs, self.per_node * self.network_gbs)
        crossing = min(nodes, hops) if nodes > 1 else 0
        latency = crossing * self.network_s + (hops - crossing) * self.link_s
        return size * hops / processes / rate / 1e9 + latency

    def send_s(self, size: float, processes: int) -> float:
        """Seconds in which each process sends `size` bytes to another one, of another node where there are several."""
        if processes == 1:
            return 0.0
        if processes > self.per_node:
            return size / self.network_gbs / 1e9 + self.network_s
        return size / self.link_gbs / 1e9 + self.link_s

    def agree_s(self, processes: int) -> float:
        """Seconds of summing a few numbers over all processes: a tree up and down."""
        within, nodes = min(processes, self.per_node), math.ceil(processes / self.per_node)
        return 2 * (math.ceil(math.log2(within)) * self.link_s + math.ceil(math.log2(nodes)) * self.network_s)


@dataclass(frozen=True)
class Bucket:
    """Gradients that are reduced at once: their bytes, and the share of the backward pass after which they are complete."""

    size: float
    ready: float


@dataclass(frozen=True)
class Work:
    """A process's work in one step.

    Attributes:
        micro_batches: their number.
        forward_s, backward_s: seconds of one micro-batch.
        buckets: in the order in which they are reduced.
        overlap: reduce while the last backward pass goes on.
        exchange_size: bytes of sums that each process sends to the owners of their partitions.
        optimizer_s: seconds of norm, clipping, update and average of this process's share.
        gather_size: bytes of all weights.
        agreements: sums of a few numbers over all processes in a step.
        jitter: relative standard deviation of a process's computing time from step to step.
    """

    micro_batches: int
    forward_s: float
    backward_s: float
    buckets: tuple[Bucket, ...]
    overlap: bool
    exchange_size: float
    optimizer_s: float
    gather_size: float
    agreements: int
    jitter: float

    @property
    def compute_s(self) -> float:
        """Seconds of all passes of a step, without jitter."""
        return self.micro_batches * (self.forward_s + self.backward_s)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what the slowest process does in them.

    Attributes:
        compute: a mean process's passes.
        waiting: for the slowest process's passes.
        reduction: after the slowest process's passes, until all buckets are reduced and exchanged.
        optimizer: norm and update.
        gather: of the weights.
    """

    compute: float
    waiting: float
    reduction: float
    optimizer: float
    gather: float

    @property
    def total(self) -> float:
        return self.compute + self.waiting + self.reduction + self.optimizer + self.gather


def simulate_step(work: Work, network: Network, processes: int, rng: random.Random) -> StepTime:
    """Simulates one step: events are buckets that a process completes, and its end of the last backward pass."""
    slowness = [max(0.0, rng.gauss(1.0, work.jitter)) for _ in range(processes)]
    before = work.compute_s - work.backward_s
    events: list[tuple[float, int]] = []  # time, number of the bucket; the backward pass's end has the last number
    end = len(work.buckets)
    for slow in slowness:
        events += [(slow * (before + b.ready * work.backward_s), i) for i, b in enumerate(work.buckets)]
        events.append((slow * work.compute_s, end))
    heapq.heapify(events)
    missing = [processes] * (end + 1)
    complete = [math.inf] * (end + 1)  # when all processes have completed it
    while events:
        now, i = heapq.heappop(events)
        missing[i] -= 1
        if not missing[i]:
            complete[i] = now
    last = complete[end]
    free = 0.0 if work.overlap else last
    for bucket, ready in zip(work.buckets, complete, strict=False):
        free = max(free, ready) + network.ring_s(bucket.size, processes)
    reduced = max(last, free) + network.send_s(work.exchange_size, processes)
    mean = work.compute_s * fmean(slowness)
    agreeing = work.agreements * network.agree_s(processes)
    gather = network.ring_s(work.gather_size, processes)
    return StepTime(mean, last - mean, reduced - last, work.optimizer_s + agreeing, gather)


def mean_step(work: Work, network: Network, processes: int, seed: int = 0) -> StepTime:
    """The mean over simulated steps: 20, and more of few processes, whose slowest varies most."""
    rng = random.Random(seed)
    steps = max(20, 4000 // processes) if work.jitter else 1
    times = [simulate_step(work, network, processes, rng) for _ in range(steps)]
    return StepTime(*(fmean(getattr(t, f.name) for t in times) for f in fields(StepTime)))


@dataclass(frozen=True)
class Run:
    """A run to be simulated.

    Attributes:
        steps, step_s: their number, and the seconds of each.
        every: steps between checkpoints.
        stop_s: seconds for which training stands still for a checkpoint.
        write_s: seconds after that until the checkpoint is whole.
        restart_s: seconds from a start to its first step, the run's first start included.
        failures_per_s: rate of failures of all GPUs together; each ends all processes.
    """

    steps: int
    step_s: float
    every: int
    stop_s: float
    write_s: float
    restart_s: float
    failures_per_s: float


@dataclass(frozen=True)
class RunTime:
    """Seconds of a run, the seconds of them in which steps were taken that counted, and its number of failures.

    A run that failures keep from its end takes infinite seconds.
    """

    seconds: float
    useful: float
    failures: float

    @property
    def goodput(self) -> float:
        return self.useful / self.seconds


def simulate_run(run: Run, rng: random.Random) -> RunTime:
    """Simulates one run: events are failures, and checkpoints that are due. A failure leads back to the newest whole one."""
    now, step, kept, failures = run.restart_s, 0, 0, 0
    writing: tuple[float, int] | None = None  # when the checkpoint that is being written is whole, and its step
    failure = _next_failure(run, rng, 0.0)
    while step < run.steps:
        if failures == MOST_FAILURES:
            return RunTime(math.inf, run.steps * run.step_s, failures)
        goal = min(run.steps, step - step % run.every + run.every)
        due = now + (goal - step) * run.step_s
        if writing is not None and writing[0] <= min(due, failure):
            kept, writing = writing[1], None
        if failure < due + run.stop_s:
            failures += 1
            now, step, writing = failure + run.restart_s, kept, None
            failure = _next_failure(run, rng, failure)
            continue
        now, step = due + run.stop_s, goal
        if writing is not None:  # it waits for the one before
            now = max(now, writing[0])
            kept = writing[1]
        writing = now + run.write_s, step
    end = writing[0] if writing else now
    return RunTime(end, run.steps * run.step_s, failures)


def _next_failure(run: Run, rng: random.Random, after: float) -> float:
    return after + rng.expovariate(run.failures_per_s) if run.failures_per_s else math.inf


def mean_run(run: Run, seed: int = 0, runs: int = 50) -> RunTime:
    """The mean over simulated runs."""
    rng = random.Random(seed)
    times = [simulate_run(run, rng) for _ in range(runs if run.failures_per_s else 1)]
    return RunTime(*(fmean(getattr(t, f.name) for t in times) for f in fields(RunTime)))
