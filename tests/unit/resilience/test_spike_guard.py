"""Which steps are skipped: the bound against a plain reference, and what is remembered."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict

import numpy as np
import pytest
import torch

from pretrain.config import GuardSection
from pretrain.diffusion import Loss
from pretrain.distributed.engine import World
from pretrain.resilience.spike_guard import Health, SpikeGuard, StepVerdict, bound

ALONE = World(0, 1, torch.device("cpu"))


class Unasked:
    """Nobody asked to stop."""

    code = 0.0


def judge(guard: SpikeGuard, health: Health, loss: float, norm: float) -> StepVerdict:
    guard.begin(health)
    for part in (0.5, 1.5):  # two micro-batches
        value = torch.tensor(loss * part)
        guard.add(("a", "b"), Loss(value, value.expand(2), torch.zeros(2)))
    look = guard(torch.tensor(norm**2, dtype=torch.float64))
    assert look.admitted == (guard.verdict.fault is None)
    return guard.verdict


def made(**config) -> SpikeGuard:
    return SpikeGuard(GuardSection(**config), ALONE, Unasked())  # type: ignore[arg-type]


def test_the_bound_is_the_median_and_so_many_robust_deviations_of_the_logarithm() -> None:
    rng = random.Random(0)
    values = tuple(math.exp(rng.gauss(1, 0.4)) for _ in range(101))
    logs = np.log(values)
    spread = 1.4826 * np.median(np.abs(logs - np.median(logs)))
    assert bound(values, 3) == pytest.approx(np.exp(np.median(logs) + 3 * spread))
    assert 1.4826 * np.median(np.abs(logs - np.median(logs))) == pytest.approx(0.4, rel=0.2)


def test_one_outlier_hardly_moves_the_bound() -> None:
    values = tuple(1 + 0.01 * (i % 7) for i in range(100))
    assert bound((*values, 1e6), 8) == pytest.approx(bound(values, 8), rel=0.02)


def test_below_twice_the_median_nothing_is_a_spike() -> None:
    assert bound((1.0,) * 50, 8) == pytest.approx(2)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(loss: float, norm: float) -> None:
    verdict = judge(made(), Health(), loss, norm)
    assert verdict.fault in (f"the loss is {loss}", f"the gradient's norm is {norm}")


def test_loss_and_norm_are_means_over_micro_batches() -> None:
    verdict = judge(made(), Health(), 3.0, 4.0)
    assert (verdict.loss, verdict.norm, verdict.fault) == (3.0, 4.0, None)


def test_a_spike_needs_enough_steps_before_it() -> None:
    guard = made(min_history=10, window=20)
    steps = (1.0,) * 9
    assert judge(guard, Health(steps, steps, (0,) * len(steps)), 100.0, 1.0).fault is None
    steps = (1.0,) * 10
    assert "the loss is 100, more than 2, the bound after the last 10 steps" in str(
        judge(guard, Health(steps, steps, (0,) * len(steps)), 100.0, 1.0).fault
    )
    assert "the gradient's norm is 50" in str(judge(guard, Health(steps, steps, (0,) * len(steps)), 1.0, 50.0).fault)
    assert judge(made(min_history=10, deviations=0), Health(steps, steps, (0,) * len(steps)), 100.0, 50.0).fault is None


def test_a_step_is_judged_by_those_of_its_own_bin() -> None:
    """FlexDiT's steps lie in one bin of the noise level each: a rare bin of high losses is no spike."""
    guard = made(min_history=10, window=20)
    health = Health((1.0,) * 20 + (40.0,) * 10, (1.0,) * 30, (0,) * 20 + (3,) * 10)
    for bin_, loss, spike in ((3, 40.0, False), (0, 40.0, True), (3, 90.0, True), (1, 90.0, False)):
        guard.begin(health, bin_)
        guard.add(("a",), Loss(torch.tensor(loss), torch.tensor([loss]), torch.zeros(1)))
        guard(torch.tensor(1.0, dtype=torch.float64))
        assert (guard.verdict.fault is not None) == spike, (bin_, loss)


def test_of_each_bin_the_last_steps_are_kept() -> None:
    health = Health()
    for i in range(12):
        health = health.after(StepVerdict(float(i), float(i), bin=i % 3 if i < 9 else 0), window=2)
    assert health.bins == (1, 2, 1, 2, 0, 0) and health.losses == (4.0, 5.0, 7.0, 8.0, 10.0, 11.0)
    assert health.of_bin(health.losses, 1) == (4.0, 7.0)


def test_skipped_steps_do_not_count_into_the_bound() -> None:
    health = Health((1.0, 2.0), (3.0, 4.0), (0, 0), skipped=1)
    health = health.after(StepVerdict(99.0, 99.0, "a spike"), window=2)
    assert (health.losses, health.skipped, health.in_a_row) == ((1.0, 2.0), 2, 1)
    health = health.after(StepVerdict(5.0, 6.0), window=2)
    assert (health.losses, health.norms, health.skipped, health.in_a_row) == ((2.0, 5.0), (4.0, 6.0), 2, 0)


def test_health_survives_a_checkpoint_exactly() -> None:
    health = Health((0.1, 1 / 3), (math.pi, 2e-300), (0, 3), 3, 1, 2)
    assert Health.of(json.loads(json.dumps(asdict(health)))) == health
