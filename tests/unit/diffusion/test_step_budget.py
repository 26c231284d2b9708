"""Steps that lie in one bin of the noise level are, taken together, the unbinned expectation."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from pretrain.diffusion import EpsilonPrediction, RectifiedFlow
from pretrain.diffusion.step_budget import StepBudget, step_budget
from pretrain.models import ComputeBudget, preset
from pretrain.models.mixers.flexdit import BINS

FLEX = preset("flexdit_b2")
BOTH = replace(FLEX, attention="mediators")
OBJECTIVES = [RectifiedFlow(), RectifiedFlow(std=1.4, shift=5.0), RectifiedFlow(times="uniform"), EpsilonPrediction()]


def test_a_plain_model_has_no_choice():
    uniform = torch.rand(5)
    step = step_budget(preset("dit_b2"), RectifiedFlow(), 0, 3)
    assert step == StepBudget(ComputeBudget())
    assert torch.equal(step.narrow(uniform), uniform)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_steps_times_are_those_of_the_objective(objective):
    """Bins as often as their times, and within a bin the objective's own: the times' quantiles are uniform again."""
    steps = [step_budget(FLEX, objective, seed=1, step=s) for s in range(4000)]
    count = Counter(s.group for s in steps)
    shares = [objective.cdf((i + 1) / BINS) - objective.cdf(i / BINS) for i in range(BINS)]
    assert [count[i] / 4000 for i in range(BINS)] == pytest.approx(shares, abs=2e-3)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([s.narrow(torch.rand(8, generator=generator)) for s in steps]).double().sort().values
    even = (torch.arange(len(drawn)) + 0.5) / len(drawn)
    assert (drawn - even).abs().max() < 0.01


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_times_of_a_step_lie_in_its_bin(objective):
    latent = torch.zeros(64, 1, 1, 1)
    uniform = torch.linspace(0.001, 0.999, 64)
    for s in range(40):
        step = step_budget(FLEX, objective, seed=0, step=s)
        t = objective.corrupt(latent, latent, step.narrow(uniform)).timestep_B / 1000
        assert step.budget.get("flexdit") == step.group, "steps of one bin can be compared"
        assert step.group / BINS - 1e-5 <= t.min() and t.max() <= (step.group + 1) / BINS + 1e-5


def test_binned_losses_have_the_unbinned_mean():
    objective, function = RectifiedFlow(mean=-0.5), lambda t: (3 * t).exp()
    latent = torch.zeros(256, 1, 1, 1)
    generator = torch.Generator().manual_seed(2)

    def times(uniform_B):
        return objective.corrupt(latent, latent, uniform_B).timestep_B / 1000

    steps = [step_budget(FLEX, objective, seed=5, step=s) for s in range(1000)]
    binned = torch.stack([function(times(s.narrow(torch.rand(256, generator=generator)))).mean() for s in steps]).mean()
    plain = torch.stack([function(times(torch.rand(256, generator=generator))).mean() for _ in steps]).mean()
    assert binned.item() == pytest.approx(plain.item(), rel=0.005)


def test_each_number_of_mediators_comes_as_often():
    count = Counter(step_budget(BOTH, RectifiedFlow(), seed=0, step=s).budget.get("mediators") for s in range(3000))
    assert count.keys() == {4, 16, 64}
    assert all(value == pytest.approx(1000, abs=100) for value in count.values())


def test_a_step_is_the_same_again_and_another_seed_is_another():
    def of(seed):
        return [step_budget(BOTH, RectifiedFlow(), seed, s) for s in range(100)]

    assert of(3) == of(3)
    assert of(3) != of(4)
