"""The compute budgets that a backbone can take: the default at a noise level t (0 is data, 1 noise), and all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pretrain.models.compute_budget import ComputeBudget
from pretrain.models.config import DiTConfig


def check_budget(config: DiTConfig, budget: ComputeBudget) -> ComputeBudget:
    """Returns the budget. Raises ValueError where the backbone has no such choice, or leaves open one that is missing in it."""
    given, open_ = dict(budget.choices), config.open_methods
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
    return budget


def default_budget(config: DiTConfig, t: float, chosen: Mapping[str, int] | None = None) -> ComputeBudget:
    """The budget at noise level t in 0..1: `chosen` by method, the methods' own defaults elsewhere.

    Raises:
        ValueError: the backbone cannot do what is chosen.
    """
    chosen = chosen or {}
    defaults = {method.name: method.default_choice(t) for method in config.open_methods if method.name not in chosen}
    names = [*(method.name for method in config.open_methods), *chosen]
    return check_budget(
        config, ComputeBudget(tuple((name, {**defaults, **chosen}[name]) for name in dict.fromkeys(names)))
    )


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
