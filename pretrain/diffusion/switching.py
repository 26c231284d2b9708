"""The compute budget of each picture at each sampling step, where the default by noise level is not wanted.

Letters: B images, C latent channels, S sampling steps.

Two rules for attention mediators (arXiv 2408.05710), each made for one model, so that what the model cannot do is refused
before anything is drawn:

    Fixed       one number for all steps
    Switching   more, once a picture changes less from step to step; while sampling only

Switching is the paper's: with δ_i = mean |x_i − x_{i−1}| over a picture's latent after step i, δ_1 is left aside, the mean of
δ_2 to δ_4 is the reference, and the picture starts with the fewest mediators. From δ_5 on, once δ < ρ_1 · reference it goes on
to the next number, once δ < ρ_2 · reference to the one after, and never back. The paper finds ρ by a grid search and does not
publish it; `python -m pretrain.analyze mediators` is such a search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar, Protocol

from torch import Tensor

from pretrain.models.budget_choices import default_budget
from pretrain.models.compute_budget import ComputeBudget
from pretrain.models.config import DiTConfig
from pretrain.models.mixers.mediators import Mediators

REFERENCE = slice(1, 4)  # the changes that make up the reference: not the first, which comes from pure noise


class BudgetRule(Protocol):
    """A picture's compute budget, step by step."""

    watches: ClassVar[bool]
    """The rule needs the changes."""

    def budget(self, t: float, changes: Sequence[float]) -> ComputeBudget:
        """The budget at noise level t, after the changes δ of the picture's steps so far."""
        ...


@dataclass(frozen=True)
class Fixed:
    """One number. Raises ValueError where the model has no mediators, or no tables for so many."""

    config: DiTConfig
    mediators: int
    watches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.budget(0.0, ())

    def budget(self, t: float, changes: Sequence[float]) -> ComputeBudget:
        return default_budget(self.config, t, {Mediators.name: self.mediators})


@dataclass(frozen=True)
class Switching:
    """The δ rule. `rho`: one fewer than the model has numbers, each above 0; the first leads to the second number.

    Raises:
        ValueError: the model has no mediators, or `rho` is not of that kind.
    """

    config: DiTConfig
    rho: tuple[float, ...]
    watches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.config.attention != Mediators.name:
            raise ValueError(f"mediator ρ {self._given}: this model has full attention; leave them out")
        numbers = ", ".join(map(str, self._numbers))
        if len(self.rho) != len(self._numbers) - 1:
            raise ValueError(
                f"mediator ρ {self._given}: expected {len(self._numbers) - 1}, one fewer than the model's "
                f"numbers of mediators ({numbers})"
            )
        if not all(math.isfinite(rho) and rho > 0 for rho in self.rho):
            raise ValueError(f"mediator ρ {self._given}: expected finite numbers above 0")

    @property
    def _numbers(self) -> tuple[int, ...]:
        return self.config.mediators.numbers

    @property
    def _given(self) -> str:
        return ", ".join(f"{rho:g}" for rho in self.rho) or "(none)"

    def stage(self, changes: Sequence[float]) -> int:
        """The number of switches that a picture has made after these changes, δ_1 the first."""
        compared = changes[REFERENCE.stop :]
        if not compared:
            return 0
        made_of = changes[REFERENCE]
        reference, least = sum(made_of) / len(made_of), min(compared)
        return len(list(takewhile(lambda rho: least < rho * reference, self.rho)))

    def budget(self, t: float, changes: Sequence[float]) -> ComputeBudget:
        return default_budget(self.config, t, {Mediators.name: self._numbers[self.stage(changes)]})


def choose_rule(
    config: DiTConfig, mediators: int | None = None, rho: Sequence[float] | None = None
) -> BudgetRule | None:
    """The rule for a fixed number of mediators or for ρ; None for the model's default by noise level.

    Raises:
        ValueError: both are given, or the model cannot do it.
    """
    if mediators is not None and rho is not None:
        raise ValueError("a fixed number of mediators and mediator ρ, which change it, exclude each other; give one")
    if mediators is not None:
        return Fixed(config, mediators)
    return None if rho is None else Switching(config, tuple(rho))


def change(after_BCHW: Tensor, before_BCHW: Tensor) -> Tensor:
    """δ [B]: each picture's mean absolute change."""
    return (after_BCHW - before_BCHW).abs().flatten(1).mean(1)


class BudgetSchedule:
    """Follows a rule step by step, for B pictures."""

    def __init__(self, rule: BudgetRule, pictures: int):
        self.rule = rule
        self._changes_BS: list[list[float]] = [[] for _ in range(pictures)]
        self._before: Tensor | None = None

    def next(self, t: float, latent_BCHW: Tensor) -> list[ComputeBudget]:
        """Each picture's budget at the next step, which starts at noise level t from these latents.

        A rule that watches waits for the device here.
        """
        if self.rule.watches:
            if self._before is not None:
                for changes, delta in zip(self._changes_BS, change(latent_BCHW, self._before).tolist(), strict=True):
                    changes.append(delta)
            self._before = latent_BCHW
        return [self.rule.budget(t, changes) for changes in self._changes_BS]
