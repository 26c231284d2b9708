"""Passes over a set: each takes every sample once, in an order of its own, before any comes again.

Shares that change by step are drawn so: an epoch takes the next samples of the endless row of a set's passes, however many its
share asks for, and the next epoch goes on where it ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """A part of the row of a set's passes: `count` samples after the first `before` ones."""

    before: int
    count: int


def draw(samples_per_shard: np.ndarray, part: Part, granule: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Draws a part of the row of passes.

    A pass is the set's granules, `granule` neighbouring samples of a shard each (the last of a shard may have less), in random
    order.

    Args:
        samples_per_shard: the samples of each shard of the set [n].
        seed: of all passes; a pass adds its number.

    Returns:
        How many neighbouring entries of the second array are of one shard and pass [m], and the samples' numbers in the set
        [count], in order within each pass.
    """
    total, end = int(samples_per_shard.sum()), part.before + part.count
    units, numbers = [], []
    for number in range(part.before // total, -(-end // total)):
        window = max(part.before - number * total, 0), min(end - number * total, total)
        drawn = _window(samples_per_shard, *window, granule, np.random.default_rng([*seed, number]))
        shards = np.searchsorted(samples_per_shard.cumsum(), drawn, side="right")
        counts = np.bincount(shards, minlength=len(samples_per_shard))
        units.append(counts[counts > 0])
        numbers.append(drawn)
    return np.concatenate(units), np.concatenate(numbers)


def _window(
    samples_per_shard: np.ndarray, begin: int, end: int, granule: int, random: np.random.Generator
) -> np.ndarray:
    """The samples of a pass from place `begin` to before `end`, sorted [end − begin]."""
    granules = -(-samples_per_shard // granule)
    shard = np.repeat(np.arange(len(granules)), granules)
    within = (np.arange(len(shard)) - (granules.cumsum() - granules)[shard]) * granule
    first = (samples_per_shard.cumsum() - samples_per_shard)[shard] + within
    size = np.minimum(granule, samples_per_shard[shard] - within)
    order = random.permutation(len(shard))
    first, size = first[order], size[order]
    place = size.cumsum() - size
    low, high = np.maximum(begin - place, 0), np.minimum(end - place, size)
    taken = np.flatnonzero(high > low)
    taken = taken[np.argsort(first[taken])]
    first, count = (first + low)[taken], (high - low)[taken]
    return np.repeat(first - (count.cumsum() - count), count) + np.arange(count.sum())
