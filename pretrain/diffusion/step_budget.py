"""The compute budget of each training step, where the backbone's methods leave a choice.

It follows from the run's seed and the step's number: all processes agree, whatever their number, and a resumed run goes on as
it would have. A method may restrict a step's images to a part of the noise levels (`mixers/`); the step is then judged by
earlier steps of the same part alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pretrain.diffusion.objective import Objective
from pretrain.models import ComputeBudget, DiTConfig

ALL_TIMES = (0.0, 1.0)


@dataclass(frozen=True)
class StepBudget:
    """A training step's compute budget.

    Attributes:
        times: the quantiles (low, high) of the objective's times from which the step's are drawn.
        group: a key that steps with the same part of the noise levels share; their losses can be compared.
    """

    budget: ComputeBudget
    times: tuple[float, float] = ALL_TIMES
    group: int = 0

    def narrow(self, uniform_B: Tensor) -> Tensor:
        """Maps uniform numbers in 0..1 to uniform ones between the quantiles."""
        low, high = self.times
        return uniform_B if self.times == ALL_TIMES else low + (high - low) * uniform_B


def step_budget(backbone: DiTConfig, objective: Objective, seed: int, step: int) -> StepBudget:
    """The budget of step number `step` (from 0) of the run with this seed."""
    choices, times, group = [], ALL_TIMES, 0
    for method in backbone.open_methods:
        chosen = method.training_choice(objective.cdf, seed, step)
        choices.append((method.name, chosen.choice))
        if chosen.times != ALL_TIMES:
            assert times == ALL_TIMES, "two methods restrict the noise levels of one step"
            times, group = chosen.times, chosen.choice
    return StepBudget(ComputeBudget(tuple(choices)), times, group)
