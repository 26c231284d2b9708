"""Means over seeds and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.evaluate.metric import Value


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, its standard error, and the two-sided p of Student's paired t-test.

    `sem` and `p` are NaN for fewer than two pairs.
    """

    mean: float
    sem: float
    p: float


def mean_and_sem(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN for a single value."""
    found = Value.mean(values)
    return found.value, math.nan if found.sem is None else found.sem


def paired(values: Sequence[float], before: Sequence[float]) -> Difference:
    """Compares values with those that they are paired with."""
    mean, sem = mean_and_sem([a - b for a, b in zip(values, before, strict=True)])
    if math.isnan(sem):
        return Difference(mean, math.nan, math.nan)
    if sem == 0:
        return Difference(mean, 0.0, 1.0 if mean == 0 else 0.0)
    return Difference(mean, sem, student_p(mean / sem, len(values) - 1))


def student_p(t: float, degrees: int) -> float:
    """The two-sided p of Student's t for whole degrees of freedom, by finite sums (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    term, total = (cosine, cosine) if degrees % 2 else (1.0, 1.0)
    for k in range(3 if degrees % 2 else 2, degrees, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if degrees == 1:
        return 1 - 2 * theta / math.pi
    inside = 2 / math.pi * (theta + sine * total) if degrees % 2 else sine * total
    return max(0.0, 1 - inside)
