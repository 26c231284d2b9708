"""Passes over sets: what an epoch draws, and the order of shares by step, beside plain loops; resumed on other processes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import entry, joined, keys_in, loader_of, orders, slots, write_set
from streaming.base.shuffle import get_shuffle

from pretrain.data.passes import Part, draw
from pretrain.data.training_set import GRANULE, sample_seed

BY_STEP = "data.sources={a: {0: 3, 7: 1}, b: 1}"


def row(samples_per_shard: list[int], granule: int, seed: list[int]) -> Iterator[tuple[int, int, int]]:
    """The endless row of passes in plain loops: (pass, shard, sample's number in the set)."""
    shards = np.split(np.arange(sum(samples_per_shard)), np.cumsum(samples_per_shard)[:-1])
    granules = [
        (number, shard[i : i + granule].tolist())
        for number, shard in enumerate(shards)
        for i in range(0, len(shard), granule)
    ]
    for turn in itertools.count():
        for place in np.random.default_rng([*seed, turn]).permutation(len(granules)):
            number, samples = granules[place]
            yield from ((turn, number, sample) for sample in samples)


def drawn_plainly(
    samples_per_shard: list[int], part: Part, granule: int, seed: list[int]
) -> tuple[list[int], list[int]]:
    part_of_row = itertools.islice(row(samples_per_shard, granule, seed), part.before, part.before + part.count)
    in_order = sorted(part_of_row)
    units = [len(list(group)) for _, group in itertools.groupby(in_order, key=lambda taken: taken[:2])]
    return units, [sample for *_, sample in in_order]


@pytest.mark.parametrize("granule", [1, 4, 64])
@pytest.mark.parametrize("samples", [[7], [5, 9, 1, 4], [64, 3]])
def test_draws_are_those_of_plain_loops(samples: list[int], granule: int) -> None:
    """In parts of any length, one after the other: within a pass, over its end, several passes, single samples."""
    before = 0
    for count in (1, 3, 0, sum(samples) - 4, 2 * sum(samples) + 1, 5, 40):
        if not count:
            continue
        units, numbers = draw(np.array(samples), Part(before, count), granule, [3, 1])
        assert (units.tolist(), numbers.tolist()) == drawn_plainly(samples, Part(before, count), granule, [3, 1])
        before += count


def test_the_order_of_shares_by_step(tmp_path: Path) -> None:
    """Each step's samples and their seeds over five epochs, the second cut by the change, beside plain loops."""
    root = write_set(tmp_path / "set", {"a": 24, "b": 16})
    loader = loader_of(root, BY_STEP, "data.workers=0", "data.shuffle_block=24", "seed=5")
    # 40 samples are five steps. The first two epochs have 75% of a, the others 50%.
    epochs = [(5, 30, 10), (2, 12, 4), (5, 20, 20), (5, 20, 20), (5, 20, 20)]
    shards = [[keys_in(root, i, f"{s}/256") for i in range(len(loader.indexes[f"{s}/256"]))] for s in "ab"]
    assert all(len(of_set) > 1 for of_set in shards) and entry(root, 0)["samples"] < GRANULE
    keys = [[key for shard in of_set for key in shard] for of_set in shards]
    before, seen, steps = [0, 0], Counter[str](), iter(loader)
    for epoch, (length, *counts) in enumerate(epochs):
        units, drawn = [], []
        for stream, count in enumerate(counts):
            sizes = [len(shard) for shard in shards[stream]]
            more, numbers = drawn_plainly(sizes, Part(before[stream], count), GRANULE, [5, stream])
            units += more
            drawn += [keys[stream][number] for number in numbers]
            before[stream] += count
        names, times = [], Counter[str]()
        for key in drawn:
            names.append(f"{key}/{times[key]}" if times[key] else key)
            times[key] += 1
        shuffle = get_shuffle("py1e", np.array(units), 1, 5, epoch, 24)
        expected = [(drawn[i], sample_seed(5, epoch, names[i])) for i in shuffle]
        assert len(expected) == 8 * length
        for step in range(length):
            assert slots(next(steps)) == expected[8 * step : 8 * step + 8], (epoch, step)
            assert loader.position.epoch == epoch and loader.position.step_in_epoch == step + 1
        seen.update(drawn)
        for of_set in keys:
            assert max(seen[k] for k in of_set) - min(seen[k] for k in of_set) <= 1, "all of a source before one again"


def test_constant_shares_keep_the_order(tmp_path: Path) -> None:
    """A schedule without a change, in shares or in proportions, is the plain mixture bit for bit."""
    root = write_set(tmp_path / "set", {"a": 24, "b": 16})
    plain = loader_of(root, "data.sources={a: 3, b: 1}", "data.workers=0")
    expected = [slots(step) for _, step in zip(range(12), plain, strict=False)]
    for sources in ("{a: {0: 3}, b: 1}", "{a: {0: 3, 7: 3}, b: {0: 1}}", "{a: {0: 3, 7: 6}, b: {0: 1, 7: 2}}"):
        loader = loader_of(root, f"data.sources={sources}", "data.workers=0")
        assert [slots(step) for _, step in zip(range(12), loader, strict=False)] == expected
        assert loader.fingerprint == plain.fingerprint
    changed = loader_of(root, BY_STEP, "data.workers=0")
    assert changed.fingerprint["draws"] != plain.fingerprint["draws"]
    assert loader_of(root, BY_STEP.replace("7", "8")).fingerprint != changed.fingerprint


def test_shares_by_step_go_on_with_other_processes(tmp_path: Path) -> None:
    """The same steps for one and two processes and any workers, from the middle of each epoch on; whole buckets, too."""
    sources = "data.sources={a: {0: 1, 13: 1}, b: {0: 0, 13: 1}}"
    all_steps, in_epoch_0, in_epoch_2 = (0, [0, 0], 16), (2, [0, 4], 12), (0, [2, 1], 2)
    jobs: list[dict[str, Any]] = []
    sets = {False: (all_steps, in_epoch_0), True: (all_steps, in_epoch_2)}
    for buckets, starts in sets.items():
        root = write_set(tmp_path / f"buckets_{buckets}", {"a": 24, "b": 16}, buckets=buckets)
        for workers, start, steps in starts:
            words = [f"data.path={root}", sources, f"data.workers={workers}"]
            jobs.append({"words": words, "start": start, "steps": steps})
    one, two = orders(jobs, 1, tmp_path), orders(jobs, 2, tmp_path)
    for first, last in ((0, 2), (2, 4)):
        whole = joined([one[0][first]])
        assert [at for *_, at in whole] == [[e, s + 1] for e, n in ((0, 10), (1, 3), (2, 3)) for s in range(n)]
        for job in range(first, last):
            steps = jobs[job]["steps"]
            for by_process in (one, two):
                assert joined([p[job] for p in by_process]) == whole[16 - steps :], (jobs[job], len(by_process))
                assert all(p[job]["fingerprint"] == one[0][first]["fingerprint"] for p in by_process)
        of_b = [sum(key.startswith("b/") for key, _ in keys) for keys, _, _ in whole]
        assert not any(of_b[:13]) and any(of_b[13:])
        assert all(len(shapes) == 1 for _, shapes, _ in whole)
