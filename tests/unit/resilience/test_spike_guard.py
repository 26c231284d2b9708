"""Which steps are skipped: the bound against a plain reference, and its groups."""

from __future__ import annotations

import json
import math
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config import GuardSection
from pretrain.diffusion import Loss
from pretrain.distributed.world import World
from pretrain.resilience.spike_guard import SKIPPED, SpikeGuard, bound
from pretrain.state import StepHistory, StepVerdict

ALONE = World(0, 1, torch.device("cpu"))


class Unasked:
    """Nobody asked to stop."""

    code = 0.0


def judge(guard: SpikeGuard, history: StepHistory, loss: float, norm: float) -> StepVerdict:
    guard.begin(history)
    for part in (0.5, 1.5):  # two micro-batches
        value = torch.tensor(loss * part)
        guard.add(("a", "b"), Loss(value, value.expand(2), torch.zeros(2)))
    check = guard.judge(torch.tensor(norm**2, dtype=torch.float64))
    assert check.admitted == (guard.verdict.fault is None)
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
    verdict = judge(made(), StepHistory(), loss, norm)
    assert verdict.fault in (f"the loss is {loss}", f"the gradient's norm is {norm}")


def test_loss_and_norm_are_means_over_micro_batches() -> None:
    verdict = judge(made(), StepHistory(), 3.0, 4.0)
    assert (verdict.loss, verdict.norm, verdict.fault) == (3.0, 4.0, None)


def test_a_spike_needs_enough_steps_before_it() -> None:
    guard = made(min_history=10, window=20)
    steps = (1.0,) * 9
    assert judge(guard, StepHistory(steps, steps, (0,) * len(steps)), 100.0, 1.0).fault is None
    steps = (1.0,) * 10
    assert "the loss is 100, more than 2, the bound after the last 10 steps" in str(
        judge(guard, StepHistory(steps, steps, (0,) * len(steps)), 100.0, 1.0).fault
    )
    assert "the gradient's norm is 50" in str(
        judge(guard, StepHistory(steps, steps, (0,) * len(steps)), 1.0, 50.0).fault
    )
    assert (
        judge(made(min_history=10, deviations=0), StepHistory(steps, steps, (0,) * len(steps)), 100.0, 50.0).fault
        is None
    )


def test_a_step_is_judged_by_those_of_its_own_group() -> None:
    """A rare group whose losses are always high is no spike."""
    guard = made(min_history=10, window=20)
    history = StepHistory((1.0,) * 20 + (40.0,) * 10, (1.0,) * 30, (0,) * 20 + (3,) * 10)
    for group, loss, spike in ((3, 40.0, False), (0, 40.0, True), (3, 90.0, True), (1, 90.0, False)):
        guard.begin(history, group)
        guard.add(("a",), Loss(torch.tensor(loss), torch.tensor([loss]), torch.zeros(1)))
        guard.judge(torch.tensor(1.0, dtype=torch.float64))
        assert (guard.verdict.fault is not None) == spike, (group, loss)


def test_the_micro_batches_losses_and_keys_are_listed_for_a_skipped_step(tmp_path: Path) -> None:
    guard = made()
    judge(guard, StepHistory(), math.inf, 3.0)
    guard.record_skipped(tmp_path, 7)
    line = json.loads((tmp_path / SKIPPED).read_text())
    assert (line["step"], line["why"], line["loss"], line["gradient_norm"]) == (7, "the loss is inf", "inf", 3.0)
    assert line["samples"] == [{"key": key, "loss": "inf"} for key in ("a", "b", "a", "b")]


def test_who_asked_for_a_stop_is_counted_and_named() -> None:
    guard = made()
    assert judge(guard, StepHistory(), 1.0, 1.0).stop == 0
    guard.stop.code = float(signal.SIGTERM)  # type: ignore[misc]
    assert judge(guard, StepHistory(), 1.0, 1.0).stop == 1
    assert guard.stop_reason() == "SIGTERM (process 0)"


def test_damaged_samples_are_counted_by_process() -> None:
    guard = made()
    guard.begin(StepHistory())
    for damaged in (2, 3):
        guard.add(("a",), Loss(torch.tensor(1.0), torch.ones(1), torch.zeros(1)), damaged)
    guard.judge(torch.tensor(1.0, dtype=torch.float64))
    assert guard.verdict.damaged == 1
