"""How many attention mediators a picture has at each sampling step (arXiv 2408.05710).

Letters: B images, C latent channels, S sampling steps.

Three rules, each made for one model, so that what the model cannot do is refused before anything is drawn:

    ByLevel     few near noise, many near data, in equal parts of t: the backbone's own default
    Fixed       one number for all steps
    Switching   more, once a picture changes less from step to step; while sampling only

Switching is the paper's: with δ_i = mean |x_i − x_{i−1}| over a picture's latent, and the mean of its first three as the
reference, the picture starts with the fewest mediators; once δ < ρ_1 · reference it goes on to the next number, once
δ < ρ_2 · reference to the one after, and never back. The paper finds ρ by a grid search and does not publish it;
`python -m pretrain.analyze mediators` is such a search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

from torch import Tensor

from pretrain.models.budget import Effort
from pretrain.models.config import DiTConfig

FIRST = 3  # changes that make up the reference


@dataclass(frozen=True)
class ByLevel:
    """The number that follows from the noise level."""

    config: DiTConfig
    watches: ClassVar[bool] = False

    def effort(self, t: float, changes: Sequence[float]) -> Effort:
        return Effort.at(self.config, t)


@dataclass(frozen=True)
class Fixed:
    """One number. Raises ValueError where the model has no mediators, or no tables for so many."""

    config: DiTConfig
    mediators: int
    watches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        Effort.at(self.config, 0.0, self.mediators)

    def effort(self, t: float, changes: Sequence[float]) -> Effort:
        return Effort.at(self.config, t, self.mediators)


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
        if self.config.attention != "mediators":
            raise ValueError(f"mediator ρ {self._given}: this model has full attention; leave them out")
        numbers = ", ".join(map(str, self.config.mediators))
        if len(self.rho) != len(self.config.mediators) - 1:
            raise ValueError(
                f"mediator ρ {self._given}: expected {len(self.config.mediators) - 1}, one fewer than the model's "
                f"numbers of mediators ({numbers})"
            )
        if not all(math.isfinite(rho) and rho > 0 for rho in self.rho):
            raise ValueError(f"mediator ρ {self._given}: expected finite numbers above 0")

    @property
    def _given(self) -> str:
        return ", ".join(f"{rho:g}" for rho in self.rho) or "(none)"

    def stage(self, changes: Sequence[float]) -> int:
        """How many of the switches a picture has made after these changes, δ_1 the first."""
        if len(changes) < FIRST:
            return 0
        reference, least = sum(changes[:FIRST]) / FIRST, min(changes[FIRST - 1 :])
        return len(list(takewhile(lambda rho: least < rho * reference, self.rho)))

    def effort(self, t: float, changes: Sequence[float]) -> Effort:
        return Effort.at(self.config, t, self.config.mediators[self.stage(changes)])


# `watches`: whether the rule has to know the changes. `effort(t, changes)`: one picture's, at noise level t, after the
# changes δ of the steps made.
Rule = ByLevel | Fixed | Switching


def choose_rule(config: DiTConfig, mediators: int | None = None, rho: Sequence[float] | None = None) -> Rule | None:
    """The rule asked for, by a fixed number or by ρ; else the model's default, None without mediators.

    Raises:
        ValueError: both are given, or the model cannot do it.
    """
    if mediators is not None and rho is not None:
        raise ValueError("a fixed number of mediators and mediator ρ, which change it, exclude each other; give one")
    if mediators is not None:
        return Fixed(config, mediators)
    if rho is not None:
        return Switching(config, tuple(rho))
    return ByLevel(config) if config.attention == "mediators" else None


def change(after_BCHW: Tensor, before_BCHW: Tensor) -> Tensor:
    """δ [B]: each picture's mean absolute change."""
    return (after_BCHW - before_BCHW).abs().flatten(1).mean(1)


class Course:
    """Follows a rule step by step, for B pictures."""

    def __init__(self, rule: Rule, pictures: int):
        self.rule = rule
        self.numbers_SB: list[list[int]] = []
        self._changes_BS: list[list[float]] = [[] for _ in range(pictures)]
        self._before: Tensor | None = None

    def next(self, t: float, latent_BCHW: Tensor) -> list[Effort]:
        """Each picture's effort at the next step, which starts at noise level t from these latents.

        A rule that watches waits for the device here.
        """
        if self.rule.watches:
            if self._before is not None:
                for changes, delta in zip(self._changes_BS, change(latent_BCHW, self._before).tolist(), strict=True):
                    changes.append(delta)
            self._before = latent_BCHW
        efforts = [self.rule.effort(t, changes) for changes in self._changes_BS]
        self.numbers_SB.append([effort.mediators for effort in efforts if effort.mediators is not None])
        return efforts
