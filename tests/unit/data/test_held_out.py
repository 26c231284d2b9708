"""Samples that are held out: which ones by name, and that nothing that training reads is among them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import epoch_of, file_of, loader_of, slots, write_set

from data_prep import schema
from pretrain.config import DataSection
from pretrain.data.held_out import ShardName, is_trained_on, samples_by_set, was_trained_on
from pretrain.data.loader import Loader

SHARE = 0.6  # by their names, two of the eight tars of the source a, and five of b's
HELD_OUT = {"a": (3, 7), "b": (1, 2, 3, 5, 6)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 samples of the source a in eight tars, and 24 of b in as many."""
    return write_set(tmp_path_factory.mktemp("two") / "set", {"a": 64, "b": 24}, tars=8)


def held_out(loader: Loader) -> set[str]:
    return {f"{shard.set_}/{shard.file}" for shard in loader.held_out}


def keys_of(loader: Loader) -> set[str]:
    return {key for batch in epoch_of(loader) for key in batch.keys}


# ---- by name ----


def names(tars: int, set_: str = "a/256", shards: int = 3) -> list[ShardName]:
    return [ShardName(set_, f"{tar:05d}/shard.{i:05d}.mds") for tar in range(tars) for i in range(shards)]


def test_a_tar_is_held_out_whole_whatever_its_sets() -> None:
    """At 256 px both sets are read, at 512 px one of them: the stages hold out the same tars."""

    def tars(shards: list[ShardName]) -> set[str]:
        return {shard.tar for shard in shards if not is_trained_on(shard, 0.1)}

    both = [shard for set_ in ("a/256", "a/256-512", "a/256_16x16") for shard in names(200, set_)]
    assert 0 < len(tars(both)) < 40
    assert tars(both) == tars(names(200, "a/256-512")) == tars(names(200, "a/512", shards=1))
    kept = {shard.tar for shard in both if is_trained_on(shard, 0.1)}
    assert not kept & tars(both) and len(kept | tars(both)) == 200


def test_a_share_is_that_of_the_tars() -> None:
    """Within five standard deviations, and each share has all that a smaller one has."""
    shards, found = names(20_000, shards=1), set()
    for share in (0.001, 0.01, 0.3):
        more = {shard.tar for shard in shards if not is_trained_on(shard, share)}
        assert abs(len(more) - 20_000 * share) < 5 * np.sqrt(20_000 * share * (1 - share))
        assert found < more
        found = more


def test_a_source() -> None:
    assert is_trained_on(ShardName("ab/256", "00000/s.mds"), "a")
    assert not is_trained_on(ShardName("a/256-512", "00000/s.mds"), "a")
    assert all(is_trained_on(shard, None) for shard in names(50))


# ---- the loader ----


def test_nothing_that_is_held_out_is_trained_on(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch is all the rest, once each; together with what is held out it is the data set."""
    everything = keys_of(loader_of(two, global_batch=1, micro=1))
    capsys.readouterr()
    loader = loader_of(two, *words(SHARE), global_batch=1, micro=1)
    assert "data: 31 samples are held out for validation (0.6 of the tars)" in capsys.readouterr().out
    trained = keys_of(loader)
    assert loader.steps_per_epoch == len(trained) == 88 - 31
    seen = {key for held in loader_of(two, *words(SHARE, 24)).validation_batches() for key in held.batch.keys}
    assert len(seen) == 24 and not seen & trained and seen < everything
    tars = {name.rpartition("/")[0] for name in held_out(loader)}
    assert tars == {f"{source}/256/{tar:05d}" for source, numbers in HELD_OUT.items() for tar in numbers}


def words(validation: Any, samples: int = 8) -> list[str]:
    return [f"data.validation={validation}", f"data.validation_samples={samples}"]


def test_a_source_that_is_held_out(two: Path) -> None:
    loader = loader_of(two, *words("b", 24), global_batch=1, micro=1)
    assert keys_of(loader) == {f"a/{i:04d}" for i in range(64)}
    assert {key[0] for held in loader.validation_batches() for key in held.batch.keys} == {"b"}
    mixed = loader_of(two, *words("b", 24), "data.sources={a: 1}")
    assert mixed.fingerprint == loader_of(two, "data.sources={a: 1}").fingerprint, "the order of training is the same"


def test_another_sample_in_place_of_a_damaged_one_is_not_a_held_out_one(two: Path, tmp_path: Path) -> None:
    root = shutil.copytree(two, tmp_path / "set")
    trained = keys_of(loader_of(root, *words(SHARE), global_batch=1, micro=1))
    tar = next(tar for tar in range(8) if is_trained_on(ShardName("a/256", f"{tar:05d}/"), SHARE))
    shards = sorted((root / f"a/256/{tar:05d}").glob("*.mds"))
    for shard in shards:
        shard.unlink()
    loader = loader_of(root, *words(SHARE), global_batch=1, micro=1)
    batches = epoch_of(loader)
    assert sum(len(batch.damaged) for batch in batches) >= 8
    assert {key for batch in batches for key in batch.keys} < trained


def test_the_fingerprint_has_what_is_held_out(two: Path) -> None:
    """Not of runs without validation: those of earlier versions have none, and go on."""
    assert loader_of(two).fingerprint["held_out"] is None
    prints = [loader_of(two, *words(share), "data.sources={a: 1, b: 1}").fingerprint for share in (0.6, 0.7)]
    assert [found["held_out"] for found in prints] == [{"a/256": 16, "b/256": 15}, {"a/256": 24, "b/256": 18}]
    assert loader_of(two, *words(0.61, 16), "data.sources={a: 1, b: 1}").fingerprint == prints[0]


@pytest.mark.parametrize("options", [{}, {"buckets": True}])
def test_the_order_is_that_of_a_data_set_without_the_held_out_shards(options: dict[str, Any], tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", {"a": 64, "b": 48}, tars=8, **options)
    loader = loader_of(root, *words(SHARE))
    without, card = shutil.copytree(root, tmp_path / "without"), schema.Card.load(root)
    for name, held in samples_by_set(loader.held_out).items():
        index = without / name / schema.INDEX
        content = json.loads(index.read_text())
        kept = [s for s in content["shards"] if is_trained_on(ShardName(name, s["raw_data"]["basename"]), SHARE)]
        index.write_text(json.dumps(content | {"shards": kept}))
        card.sets[name]["samples"] -= held
    card.save(without)
    other = loader_of(without)
    assert slots(epoch_of(loader)) == slots(epoch_of(other)) and loader.plan.draws == other.plan.draws
    assert loader.held_out and loader.data.samples_per_shard.tolist() == other.data.samples_per_shard.tolist()


def test_indexes_are_not_read_again(two: Path, tmp_path: Path) -> None:
    """Once the loader is made, nothing needs them."""
    root = shutil.copytree(two, tmp_path / "set")
    loader = loader_of(root, *words(SHARE))
    for index in root.rglob(schema.INDEX):
        index.unlink()
    plain = loader_of(two, *words(SHARE))
    assert loader.fingerprint == plain.fingerprint
    seen, expected = ([h.batch.keys for h in which.validation_batches()] for which in (loader, plain))
    assert seen == expected and slots(epoch_of(loader)) == slots(epoch_of(plain))


def test_held_out_shards_that_must_be_unpickled_are_refused(two: Path, tmp_path: Path) -> None:
    root = shutil.copytree(two, tmp_path / "set")
    index = root / "b/256" / schema.INDEX
    index.write_text(index.read_text().replace('"str"', '"pkl"'))
    with pytest.raises(ValueError, match="contains an unsafe type: pkl"):
        loader_of(root, *words("b")).validation_batches()


@pytest.mark.parametrize(
    ("validation", "samples", "said"),
    [
        (
            0.001,
            8,
            r"of the tars of .* 0\.001 are 0 tars by their names, with 0 samples .*_samples asks for 8: from a share",
        ),
        (
            SHARE,
            40,
            r"7 tars by their names, with 31 samples for 256 px; .* from a share of 0\.6584 on there are enough",
        ),
        (SHARE, 96, r"with 31 samples for 256 px; data\.validation_samples asks for 96: lower that$"),
        ("b", 32, r"data\.validation: b has 24 samples for 256 px, data\.validation_samples asks for 32; lower it"),
        ("c", 8, r"data\.validation: .* has no source c with samples for 256 px; its sources that have some: a, b"),
        (0.999, 8, r"has 0 samples for 256 px that are not held out for validation, less than one global batch of 8"),
    ],
)
def test_what_cannot_be_held_out(two: Path, validation: Any, samples: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        loader_of(two, *words(validation, samples))


# ---- a run that another one starts from ----


@pytest.mark.parametrize(
    ("here", "there", "trained"),
    [
        (None, {}, False),
        (0.1, {"validation": 0.1}, False),
        (0.1, {"validation": 0.2}, False),
        (0.2, {"validation": 0.1}, True),
        (0.1, {}, True),
        (0.1, {"validation": "b"}, True),
        ("b", {"validation": "b"}, False),
        ("b", {"validation": 0.1}, True),
        ("b", {"sources": {"a": 1.0}}, False),
        ("b", {"sources": {"a": 1.0, "b": 1.0}}, True),
        ("b", {"path": "elsewhere"}, False),
    ],
)
def test_what_an_earlier_run_was_trained_on(here: Any, there: dict[str, Any], trained: bool) -> None:
    data = DataSection(path="set", resolution=256, validation=here)
    assert was_trained_on(data, {"path": "set", "sources": None, "validation": None} | there) == trained


# ---- the samples of validation ----


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """The batches of one of several processes, each asked by itself."""
    from pretrain.data import validation_set
    from pretrain.distributed.world import World

    monkeypatch.setattr(validation_set, "all_gather", lambda item, world: [item])

    def read(loader: Loader, rank: int, size: int) -> list[Any]:
        loader.world = World(rank, size, loader.world.device)
        return loader.validation_batches()

    return read


def test_each_sample_has_its_noise_level_in_batches_that_never_change(two: Path, alone) -> None:
    """The samples of a batch have one level; three processes have among them just the batches of one."""
    loader = loader_of(two, *words(0.7, 40), micro=2)
    (whole, *parts) = [alone(loader, rank, size) for rank, size in ((0, 1), (0, 3), (1, 3), (2, 3))]
    assert sorted(n for held in whole for n in held.numbers) == list(range(40))
    assert len(whole) == 24  # five samples of each of eight levels, in twos
    for held in whole:
        assert {n % 8 / 8 for n in held.numbers} == {held.t} and len(held.numbers) == len(held.batch.keys) <= 2
    dealt = {held.numbers: held for part in parts for held in part}
    assert sorted(dealt) == sorted(held.numbers for held in whole) and min(map(len, parts)) == 8
    for held in whole:
        other = dealt[held.numbers].batch
        assert (other.keys, other.seeds) == (held.batch.keys, held.batch.seeds)
        assert other.mean_BCHW.equal(held.batch.mean_BCHW) and other.text.tokens_ME.equal(held.batch.text.tokens_ME)


def test_samples_keep_their_numbers_and_noise(two: Path) -> None:
    """Whatever the micro-batch, the run's seed, or the dropout of captions."""

    def said(*more: str, micro: int = 4) -> dict[int, Any]:
        batches = loader_of(two, *words(0.7, 32), *more, micro=micro).validation_batches()
        rows = (zip(h.numbers, h.batch.keys, h.batch.seeds, h.batch.text.captions(), strict=True) for h in batches)
        return {number: (key, seed, text.tolist()) for batch in rows for number, key, seed, text in batch}

    assert said() == said("seed=9", "data.caption_dropout=0.9", micro=1)
    assert len({key[:1] for key, *_ in said().values()}) == 2, "samples of both sources"


def test_buckets(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", {"a": 96}, buckets=True, tars=8)
    loader = loader_of(root, *words(SHARE, 24))
    batches = loader.validation_batches()
    assert {tuple(held.batch.mean_BCHW.shape[2:]) for held in batches} == {(32, 32), (28, 36)}
    assert sorted(n for held in batches for n in held.numbers) == list(range(24))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_shards_in_a_cache(two: Path, compression: str | None, tmp_path: Path) -> None:
    """Those that validation needs are fetched, and unpacked; training fetches none of the others."""
    root = write_set(tmp_path / "set", {"a": 64, "b": 24}, tars=8, compression=compression)
    loader = loader_of(root, *words(SHARE), f"data.cache={tmp_path / 'cache'}", "data.workers=0")
    expected = {held.batch.keys: held.batch.seeds for held in loader_of(two, *words(SHARE)).validation_batches()}
    assert {held.batch.keys: held.batch.seeds for held in loader.validation_batches()} == expected
    needed = {f"{p.parents[2].name}/{p.parents[1].name}/{p.parent.name}/{p.name}" for p in loader.root.rglob("*.mds")}
    assert needed and needed <= held_out(loader)
    epoch_of(loader)
    there = {f"{p.parents[2].name}/{p.parents[1].name}/{p.parent.name}/{p.name}" for p in loader.root.rglob("*.mds")}
    assert there & held_out(loader) == needed


def test_a_held_out_sample_that_is_damaged(two: Path, tmp_path: Path) -> None:
    root = shutil.copytree(two, tmp_path / "set")
    for number in range(len(list((root / "a/256").rglob("*.mds")))):
        file = file_of(root, number)
        if file.parent.name == "00006":
            raw = bytearray(file.read_bytes())
            raw[-1] ^= 1
            file.write_bytes(raw)
    loader = loader_of(root, *words("a", 64))
    said = r"data\.validation: a/256/00006/shard\.\d+\.mds: sample \d+ cannot be read \(.*--repair on the data set"
    with pytest.raises(ValueError, match=said):
        loader.validation_batches()
