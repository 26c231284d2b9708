"""The compute budget of a forward pass: how much it computes, where a method leaves that open.

A method (`mixers/`) may offer a choice, such as the number of mediators or the coarseness of a grid. It is an integer, the same
for all images of one forward pass. `budget_choices.py` has those that a backbone can take.
"""

from __future__ import annotations

from dataclasses import dataclass


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
