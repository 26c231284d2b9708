"""What an epoch draws of which sets: all samples once, mixtures, whole batches of buckets; refusals."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from data_prep import schema
from pretrain.config import load
from pretrain.data.epoch_plan import EpochPlan, _split, plan_epochs


def card_of(sets: dict[str, int], buckets: bool = False) -> schema.Card:
    """A card of sets `source/set` with so many samples each."""
    about = {name: {"source": name.split("/")[0], "resolutions": [256], "samples": n} for name, n in sets.items()}
    return schema.Card({}, {}, 300, "mean", [256], buckets=buckets, complete=True, sets=about)


def plan(sets: dict[str, int], global_batch: int, *words: str, buckets: bool = False) -> EpochPlan:
    config = load("demo_256", ["data.path=/set", *words])[0]
    return plan_epochs(card_of(sets, buckets), config, global_batch, {})


def drawn(sets: dict[str, int], global_batch: int = 8, *words: str, buckets: bool = False) -> dict[str, int]:
    return plan(sets, global_batch, *words, buckets=buckets).draws


def notes(sets: dict[str, int], *words: str, buckets: bool = False) -> tuple[str, ...]:
    return plan(sets, 8, *words, buckets=buckets).notes


def test_every_sample_once() -> None:
    assert drawn({"b/256": 5, "a/256-512": 11, "a/256": 3}) == {"a/256": 3, "a/256-512": 11, "b/256": 5}
    assert notes({"b/256": 5, "a/256": 3}) == ()


def test_sources_by_their_proportions() -> None:
    """An epoch is as long as the named sources together; a source's share is split over its sets by their samples."""
    sets = {"a/256": 300, "a/256-512": 100, "b/256": 100, "c/256": 1000}
    assert drawn(sets, 8, "data.sources={a: 3, b: 1}") == {"a/256": 281, "a/256-512": 94, "b/256": 125}
    assert drawn(sets, 8, "data.sources={b: 0.2}") == {"b/256": 100}
    note, over_run = notes(sets, "data.sources={b: 1, a: 3}", "steps=1000")
    assert "500 samples is 75.00% a (each sample 0.94 times), 25.00% b (each sample 1.25 times)" in note
    assert "nothing of c, which data.sources does not name" in note
    assert over_run.startswith(
        "data: 1,000 steps draw 6,000 samples of a (75.00%, 15.00 passes), 2,000 samples of b (25.00%"
    )


def test_buckets_give_whole_batches() -> None:
    sets = {"a/256_16x16": 40, "a/256_12x21": 23, "b/256_16x16": 17, "b/256_21x12": 7}
    assert drawn(sets, buckets=True) == {"a/256_12x21": 16, "a/256_16x16": 40, "b/256_16x16": 16}
    (note,) = notes(sets, buckets=True)
    assert "1 of 4 sets cannot fill one global batch of 8 and are left out: 7 of 87 samples (8.05%)" in note
    # 10 batches in all: 5 of each source, a's split 40 : 23.
    mixed = drawn(sets, 8, "data.sources={a: 1, b: 1}", buckets=True)
    assert mixed == {"a/256_12x21": 16, "a/256_16x16": 24, "b/256_16x16": 40}


def test_shares_by_step() -> None:
    """Whole epochs, one cut by the change, a source that comes later; each goes on where the one before ended."""
    sets = {"a/256": 30, "a/256-512": 10, "b/256": 40, "c/256": 99}
    by_step = "data.sources={a: {0: 1, 24: 3}, b: {0: 0, 24: 1}}"
    found = plan(sets, 8, by_step, "steps=60")
    assert found.sets == ("a/256", "a/256-512", "b/256") and found.steps_per_epoch == 10
    epochs = [found.epoch(number) for number in range(5)]
    assert [epoch.steps for epoch in epochs] == [10, 10, 4, 10, 10]
    a, mixed = {"a/256": 60, "a/256-512": 20}, {"a/256": 45, "a/256-512": 15, "b/256": 20}
    assert [epoch.draws for epoch in epochs] == [a, a, {"a/256": 24, "a/256-512": 8}, mixed, mixed]
    for earlier, later in pairwise(epochs):
        assert later.before == {name: n + earlier.draws.get(name, 0) for name, n in earlier.before.items()}
    assert epochs[0].before == dict.fromkeys(found.sets, 0)
    first, second, over_run = found.notes
    assert (
        "from step 0 on an epoch of 80 samples is 100.00% a (each sample 2.00 times), 0.00% b (each sample 0.00 times);"
        in first
    )
    assert "from step 24 on an epoch of 80 samples is 75.00% a (each sample 1.50 times), 25.00% b" in second
    assert (
        over_run == "data: 60 steps draw 408 samples of a (85.00%, 10.20 passes), 72 samples of b (15.00%, 1.80 passes)"
    )
    assert (
        "20 steps draw 160 samples of a (100.00%, 4.00 passes), 0 samples of b" in notes(sets, by_step, "steps=20")[-1]
    )
    constant = plan(sets, 8, "data.sources={a: {0: 1, 24: 3}, b: {0: 2, 24: 6}}")
    assert constant == plan(sets, 8, "data.sources={a: 1, b: 2}") and not constant.scheduled


@pytest.mark.parametrize(
    ("sets", "words", "buckets", "said"),
    [
        ({"a/256": 7}, (), False, "/set has 7 samples for 256 px, less than one global batch of 8"),
        ({"a/256_16x16": 7, "a/256_15x17": 6}, (), True, "the largest of its 2 sets of one shape has 7"),
        ({"a/256": 20}, ("data.sources={x: 1, a: 1}",), False, "/set has no x with samples for 256 px; .* some: a$"),
        ({"a/256": 99, "b/256": 9}, ("data.sources={a: 1, b: 0.001}",), False, "b cannot give one sample an epoch"),
        ({"a/256_16x16": 99, "b/256_16x16": 7}, ("data.sources={a: 1, b: 1}",), True, "b cannot give one global batch"),
        (
            {"a/256": 99, "b/256": 9},
            ("data.sources={a: 1, b: {0: 0, 50: 0.001}}",),
            False,
            "data.sources: b cannot give one sample an epoch from step 50 on; raise its share",
        ),
        (
            {"a/256_16x16": 9000, "b/256_16x16": 8},
            ("data.shuffle_block=9",),
            True,
            "data.shuffle_block: 9 is too small",
        ),
    ],
)
def test_an_epoch_that_cannot_be(sets, words, buckets, said) -> None:
    with pytest.raises(ValueError, match=said):
        drawn(sets, 8, *words, buckets=buckets)


@pytest.mark.parametrize("seed", range(20))
def test_a_split_adds_up_and_is_nearest(seed: int) -> None:
    """Whole numbers that sum to the total, each less than 1 from its share; the larger remainders are rounded up."""
    chance = random.Random(seed)
    weights = [chance.choice([0.1, 1, 3, 7.5]) for _ in range(chance.randint(1, 9))]
    total = chance.randint(0, 50)
    parts = _split(total, weights)
    exact = [total * w / sum(weights) for w in weights]
    assert sum(parts) == total and all(abs(p - e) < 1 for p, e in zip(parts, exact, strict=True))
    up = [e - int(e) for p, e in zip(parts, exact, strict=True) if p > e]
    down = [e - int(e) for p, e in zip(parts, exact, strict=True) if p <= e]
    assert not up or not down or min(up) >= max(down) - 1e-9
