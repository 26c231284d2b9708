"""The compute budget of a forward pass: how much it computes, where a method leaves that open.

A method (`mixers/`) may offer a choice, such as the number of mediators or the coarseness of a grid. It is an integer, the same
for all images of one forward pass, and follows by default from their noise level t (0 is data, 1 noise).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.models.config import DiTConfig


@dataclass(frozen=True)
class ComputeBudget:
    """The choice of each method that leaves one open: (method, choice) in the order of `DiTConfig.methods`."""

    choices: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, **choices: int) -> ComputeBudget:
        """A budget of named choices."""
        return cls(tuple(choices.items()))

    def get(self, method: str) -> int | None:
        """The choice of a method; None where it leaves none open."""
        return dict(self.choices).get(method)

    def check(self, config: DiTConfig) -> ComputeBudget:
        """Returns itself. Raises ValueError where the backbone has no such choice, or leaves open one that is missing here."""
        given, open_ = dict(self.choices), config.open_methods
        for name, choice in given.items():
            if name not in {method.name for method in open_}:
                raise ValueError(
                    f"{name}: {choice}, but this model ({config.attention} attention, density {config.density}) has no such "
                    "choice; leave it out"
                )
        for method in open_:
            if given.get(method.name) not in method.choices:
                known = ", ".join(map(str, method.choices))
                raise ValueError(f"{method.name}: {given.get(method.name)} is none of {known}, which this model can do")
        return self


def default_budget(config: DiTConfig, t: float, chosen: Mapping[str, int] | None = None) -> ComputeBudget:
    """The budget at noise level t in 0..1: `chosen` by method, the methods' own defaults elsewhere.

    Raises:
        ValueError: the backbone cannot do what is chosen.
    """
    chosen = chosen or {}
    defaults = {method.name: method.default_choice(t) for method in config.open_methods if method.name not in chosen}
    names = [*(method.name for method in config.open_methods), *chosen]
    return ComputeBudget(tuple((name, {**defaults, **chosen}[name]) for name in dict.fromkeys(names))).check(config)


def common_budget(config: DiTConfig, levels: Iterable[float]) -> ComputeBudget:
    """The default budget that all these noise levels share. Raises ValueError where they differ in it."""
    found = {default_budget(config, t) for t in levels}
    if len(found) != 1:
        raise ValueError(
            "the images of one forward pass share one compute budget, but their noise levels ask for different ones; pass "
            "them one by one, or give the budget"
        )
    return found.pop()


def every_budget(config: DiTConfig) -> list[ComputeBudget]:
    """The default budgets at equally spaced noise levels that meet every choice of every method equally often."""
    levels = math.lcm(*(len(method.choices) for method in config.open_methods))
    return [default_budget(config, (i + 0.5) / levels) for i in range(levels)]
