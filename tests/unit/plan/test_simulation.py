"""Simulated steps and runs against plain arithmetic and end points."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import cast

import pytest

from pretrain.plan.simulation import Bucket, Network, Run, Work, mean_run, mean_step, simulate_run, simulate_step

# Eight processes a node; 1 GB/s within it and 0.5 between nodes, of each process.
NETWORK = Network(per_node=8, link_gbs=1.0, network_gbs=0.5, link_s=1e-3, network_s=1e-2)
STILL = Network(8, math.inf, math.inf, 0.0, 0.0)
WORK = Work(
    micro_batches=2,
    forward_s=1.0,
    backward_s=2.0,
    buckets=(Bucket(0.5e9, 0.5), Bucket(2e9, 1.0)),
    overlap=True,
    exchange_size=0.25e9,
    optimizer_s=0.125,
    gather_size=1e9,
    agreements=1,
    jitter=0.0,
)
RNG = random.Random(0)


def test_rings() -> None:
    """(N - 1)/N of the bytes, N - 1 hops; between nodes at the rate of the slower: a node's link, or all its ways out."""
    assert NETWORK.ring_s(1e9, 1) == 0
    assert NETWORK.ring_s(1e9, 4) == pytest.approx(0.75 + 3e-3)
    assert NETWORK.ring_s(1e9, 32) == pytest.approx(31 / 32 + 4e-2 + 27e-3)
    slow = replace(NETWORK, network_gbs=0.05)
    assert slow.ring_s(1e9, 32) == pytest.approx(31 / 32 / 0.4 + 4e-2 + 27e-3)
    assert replace(slow, per_node=1).ring_s(1e9, 2) == pytest.approx(1 / 2 / 0.05 + 1e-2)


def test_messages_and_agreements() -> None:
    assert (NETWORK.send_s(1e9, 1), NETWORK.agree_s(1)) == (0, 0)
    assert NETWORK.send_s(1e9, 8) == pytest.approx(1 + 1e-3)
    assert NETWORK.send_s(1e9, 16) == pytest.approx(2 + 1e-2)
    assert NETWORK.agree_s(8) == pytest.approx(2 * 3e-3)
    assert NETWORK.agree_s(32) == pytest.approx(2 * (3e-3 + 2e-2))


def test_one_process_only_computes() -> None:
    step = simulate_step(WORK, NETWORK, 1, RNG)
    assert (step.compute, step.waiting, step.reduction, step.optimizer, step.gather) == (6, 0, 0, 0.125, 0)


def test_a_step_of_two_by_hand() -> None:
    """The first bucket is complete at 5 s and takes 0.251 s; the second at 6 s, and takes 1.001; the exchange takes 0.251."""
    step = simulate_step(WORK, NETWORK, 2, RNG)
    assert step.reduction == pytest.approx(1.001 + 0.251)
    assert step.optimizer == pytest.approx(0.125 + 2e-3)
    assert step.gather == pytest.approx(0.501)
    after = simulate_step(replace(WORK, overlap=False), NETWORK, 2, RNG)
    assert after.reduction == pytest.approx(0.251 + 1.001 + 0.251)
    assert step.total == pytest.approx(6 + 1.252 + 0.127 + 0.501) and after.total == pytest.approx(step.total + 0.251)


def test_a_bucket_waits_for_the_one_before() -> None:
    """The first takes longer than what is left of the backward pass."""
    work = replace(WORK, buckets=(Bucket(4e9, 0.5), Bucket(2e9, 1.0)))
    assert simulate_step(work, NETWORK, 2, RNG).reduction == pytest.approx(5 + 2.001 + 1.001 + 0.251 - 6)


def test_without_a_network_a_step_is_as_long_as_its_slowest_process() -> None:
    """Whose excess is that of the largest of N normal numbers: 0.564 deviations of 2, 1.423 of 8, 3.24 of 1,024."""
    for processes, deviations in ((2, 0.564), (8, 1.423), (1024, 3.24)):
        step = mean_step(replace(WORK, jitter=0.02, exchange_size=0.0), STILL, processes)
        assert step.reduction == pytest.approx(0, abs=1e-9)
        assert step.compute == pytest.approx(6, rel=0.005)
        assert step.waiting / 6 / 0.02 == pytest.approx(deviations, rel=0.1)


# ---- runs ----

RUN = Run(steps=25, step_s=1.0, every=10, stop_s=0.5, write_s=3.0, restart_s=20.0, failures_per_s=0.0)


class Failures:
    """Stands for a random generator: the seconds from one failure to the next, then none."""

    def __init__(self, *seconds: float):
        self.seconds = [*seconds]

    def expovariate(self, rate: float) -> float:
        return self.seconds.pop(0) if self.seconds else math.inf


def seconds(*failures: float, run: Run = RUN) -> tuple[float, float]:
    run = replace(run, failures_per_s=1.0)
    time = simulate_run(run, cast(random.Random, Failures(*failures)))
    return time.seconds, time.failures


def test_a_run_without_failures() -> None:
    """Start, 25 steps, three checkpoints (the last at the end, which is waited for)."""
    time = mean_run(RUN)
    assert (time.seconds, time.useful, time.failures) == (20 + 25 + 3 * 0.5 + 3, 25, 0)
    assert time.goodput == pytest.approx(25 / 49.5)


def test_writing_that_takes_longer_than_the_steps_between() -> None:
    """The next checkpoint waits for it."""
    assert seconds(run=replace(RUN, write_s=15.0))[0] == pytest.approx(20 + 10.5 + 15 + 15 + 15)


@pytest.mark.parametrize(("failure", "expected"), [
    (5.0, 5 + 49.5),  # in the first start: all again
    (28.0, 28 + 49.5),  # before the first checkpoint
    (32.0, 32 + 49.5),  # while it is being written: it does not count
    (35.0, 35 + 20 + 15 + 2 * 0.5 + 3),  # after it: from step 10 on
    (45.0, 45 + 20 + 5 + 0.5 + 3),  # after the second: from step 20 on
])  # fmt: skip
def test_a_failure_leads_back_to_the_newest_whole_checkpoint(failure: float, expected: float) -> None:
    assert seconds(failure) == (pytest.approx(expected), 1)


def test_two_failures() -> None:
    """The second in the start after the first."""
    assert seconds(35.0, 10.0) == (pytest.approx(45 + 20 + 15 + 2 * 0.5 + 3), 2)


def test_failures_cost_what_they_should() -> None:
    """Each about a start and half of the steps between two checkpoints, where they are rare."""
    run = replace(RUN, steps=100_000, every=100, failures_per_s=1e-4)
    time, without = mean_run(run), mean_run(replace(run, failures_per_s=0.0))
    assert time.failures == pytest.approx(10, rel=0.1)
    assert (time.seconds - without.seconds) / time.failures == pytest.approx(20 + 50 + 3, rel=0.1)


def test_a_run_that_never_gets_on() -> None:
    time = simulate_run(replace(RUN, failures_per_s=10.0), random.Random(0))
    assert time.seconds == math.inf and time.goodput == 0
