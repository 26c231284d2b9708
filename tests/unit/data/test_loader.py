"""The loader: what an epoch is, the order for any number of processes and workers, buckets, sources, and the cache."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from data_sets import epoch_of, joined, loader_of, orders, write_set
from streaming import StreamingDataset
from support import SMALL, contents, scalars

from data_prep import encode
from data_prep import schema as shards
from data_prep.shapes import draw, scenes
from pretrain.bench.__main__ import main as bench
from pretrain.config import load
from pretrain.data.loader import Loader, Position, times_before
from pretrain.data.location import DataLocation, check_shards, plan

# ---- what an epoch draws ----


def card_of(sets: dict[str, int], buckets: bool = False) -> shards.Card:
    """A card of sets `source/set` with so many samples each."""
    about = {name: {"source": name.split("/")[0], "resolutions": [256], "samples": n} for name, n in sets.items()}
    return shards.Card({}, {}, 300, "mean", [256], buckets=buckets, complete=True, sets=about)


def drawn(sets: dict[str, int], global_batch: int = 8, *words: str, buckets: bool = False) -> dict[str, int]:
    data = load("demo_256", ["data.path=/set", *words])[0].data
    return plan(card_of(sets, buckets), data, global_batch).draws


def notes(sets: dict[str, int], *words: str, buckets: bool = False) -> tuple[str, ...]:
    data = load("demo_256", ["data.path=/set", *words])[0].data
    return plan(card_of(sets, buckets), data, 8).notes


def test_every_sample_once() -> None:
    assert drawn({"b/256": 5, "a/256-512": 11, "a/256": 3}) == {"a/256": 3, "a/256-512": 11, "b/256": 5}
    assert notes({"b/256": 5, "a/256": 3}) == ()


def test_sources_by_their_proportions() -> None:
    """An epoch is as long as the named sources together; a source's share is split over its sets by their samples."""
    sets = {"a/256": 300, "a/256-512": 100, "b/256": 100, "c/256": 1000}
    assert drawn(sets, 8, "data.sources={a: 3, b: 1}") == {"a/256": 281, "a/256-512": 94, "b/256": 125}
    assert drawn(sets, 8, "data.sources={b: 0.2}") == {"b/256": 100}
    (note,) = notes(sets, "data.sources={b: 1, a: 3}")
    assert "500 samples is 75.00% a (each sample 0.94 times), 25.00% b (each sample 1.25 times)" in note
    assert "nothing of c, which data.sources does not name" in note


def test_buckets_give_whole_batches() -> None:
    sets = {"a/256_16x16": 40, "a/256_12x21": 23, "b/256_16x16": 17, "b/256_21x12": 7}
    assert drawn(sets, buckets=True) == {"a/256_12x21": 16, "a/256_16x16": 40, "b/256_16x16": 16}
    (note,) = notes(sets, buckets=True)
    assert "1 of 4 sets cannot fill one global batch of 8 and are left out: 7 of 87 samples (8.05%)" in note
    # 10 batches in all: 5 of each source, a's split 40 : 23.
    mixed = drawn(sets, 8, "data.sources={a: 1, b: 1}", buckets=True)
    assert mixed == {"a/256_12x21": 16, "a/256_16x16": 24, "b/256_16x16": 40}


@pytest.mark.parametrize(
    ("sets", "words", "buckets", "said"),
    [
        ({"a/256": 7}, (), False, "/set has 7 samples for 256 px, less than one global batch of 8"),
        ({"a/256_16x16": 7, "a/256_15x17": 6}, (), True, "the largest of its 2 sets of one shape has 7"),
        ({"a/256": 20}, ("data.sources={x: 1, a: 1}",), False, "/set has no x with samples for 256 px; .* some: a$"),
        ({"a/256": 99, "b/256": 9}, ("data.sources={a: 1, b: 0.001}",), False, "b cannot give one sample an epoch"),
        ({"a/256_16x16": 99, "b/256_16x16": 7}, ("data.sources={a: 1, b: 1}",), True, "b cannot give one global batch"),
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


def test_times_before() -> None:
    assert times_before(np.array([5, 3, 5, 5, 3, 0])).tolist() == [0, 0, 1, 2, 1, 0]
    assert times_before(np.array([], np.int64)).tolist() == []


# ---- data sets with random samples ----


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_samples_are_what_streaming_reads(dtype: str, workers: int, tmp_path: Path) -> None:
    """The loader's own reading of a shard, and the packing in workers, change nothing."""
    root = write_set(tmp_path / "set", {"a": 20, "b": 12}, dtype)
    expected = {
        row["key"]: row for s in "ab" for row in StreamingDataset(local=f"{root}/{s}/256", shuffle=False, batch_size=1)
    }
    loader = loader_of(root, f"data.workers={workers}", "data.caption_dropout=0")
    assert loader.steps_per_epoch == 4
    seen = []
    for batch in epoch_of(loader):
        assert batch.mean_BCHW.dtype == torch.float16 and len(batch.keys) == 4
        moved = batch.to(torch.device("cpu"), torch.float32)
        assert (moved.text.tokens_ME.dtype, moved.mean_BCHW.dtype) == (torch.float32, torch.float32)
        for i, (key, text) in enumerate(zip(batch.keys, batch.text.captions(), strict=True)):
            row = expected[key]
            assert torch.equal(text, shards.text_of(row, dtype))
            assert torch.equal(moved.mean_BCHW[i], torch.tensor(row["latent_256_mean"]).float())
            assert torch.equal(moved.std_BCHW[i], torch.tensor(row["latent_256_std"]).float())
            seen.append(key)
    assert sorted(seen) == sorted(expected)
    row = loader.data[3].key, loader.data.shards[0][3]
    assert row[1].keys() == expected[row[0]].keys()
    for name, value in expected[row[0]].items():
        np.testing.assert_array_equal(row[1][name], value, strict=isinstance(value, np.ndarray))


def test_what_is_drawn_has_the_proportions(tmp_path: Path) -> None:
    """Over an epoch and the next: exact counts, each sample about as often as the next one, and each time another seed."""
    root = write_set(tmp_path / "set", {"a": 150, "b": 20, "c": 30})
    loader = loader_of(root, "data.sources={a: 0.4, b: 0.6}")
    assert loader.steps_per_epoch == 170 // 8
    first = epoch_of(loader)
    keys = [key for batch in first for key in batch.keys]
    counts = Counter(key.split("/")[0] for key in keys)
    assert sum(counts.values()) == 168
    assert abs(counts["a"] - 68) <= 2 and abs(counts["b"] - 102) <= 2  # of 170, of which two are left over
    repeats = Counter(keys)
    assert {n for key, n in repeats.items() if key.startswith("b")} <= {4, 5, 6}
    assert {n for key, n in repeats.items() if key.startswith("a")} == {1}
    seeds = [seed for batch in first for seed in batch.seeds]
    assert len(set(seeds)) == len(seeds)
    assert loader.position == Position(0, 21)
    second = {key for batch in epoch_of(loader) for key in batch.keys if key.startswith("a")}
    assert second != {key for key in repeats if key.startswith("a")}
    # The same weights in other words are the same order; other weights are not.
    prints = [
        loader_of(root, f"data.sources={{{s}}}").fingerprint["draws"]
        for s in ("b: 3, a: 2", "a: 4, b: 6", "a: 1, b: 1")
    ]
    assert loader.fingerprint["draws"] == prints[0] == prints[1] != prints[2]
    json.dumps(loader.fingerprint)


def test_refusals(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", {"a": 20})
    with pytest.raises(ValueError, match=r"data\.sources: .* has no b with samples"):
        loader_of(root, "data.sources={b: 1}")
    with pytest.raises(ValueError, match="resolution: the data set has 256 px, the config asks for 512 px"):
        loader_of(root, "data.resolution=512")
    shard = sorted((root / "a/256/00000").glob("*.mds"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(
        ValueError,
        match=rf"1 shards are missing or cut, data\.damaged_shards .*\n  {shard}: {len(content) - 1} bytes, expected",
    ):
        loader_of(root, "data.damaged_shards=0")
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard}: missing"):
        loader_of(root, "data.damaged_shards=0")
    index = root / "a/256/index.json"
    index.write_text(index.read_text().replace("00000/shard.00000", "../../elsewhere"))
    with pytest.raises(ValueError, match="names files outside of its folder"):
        loader_of(root)
    index.write_text(index.read_text()[:50])
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        loader_of(root)


# ---- the cache ----


def keys_and_text(loader: Loader) -> list[tuple[tuple[str, ...], float]]:
    return [(batch.keys, batch.text.tokens_ME.double().sum().item()) for batch in epoch_of(loader)]


def test_compressed_shards_are_unpacked_in_the_cache(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", {"a": 30, "b": 14}, compression="zstd")
    plain = write_set(tmp_path / "plain", {"a": 30, "b": 14})
    expected, before = keys_and_text(loader_of(plain)), contents(root)
    with pytest.raises(ValueError, match=r"data\.cache: the shards of .* are compressed; give a folder"):
        loader_of(root)
    assert contents(root) == before
    words = (f"data.cache={tmp_path}/cache",)
    loader = loader_of(root, *words, "data.workers=2")
    assert keys_and_text(loader) == expected
    assert contents(root) == before, "the data set is read, never written"
    (kept,) = (tmp_path / "cache").iterdir()
    assert loader.root == kept and kept.name.startswith("set-")
    assert shards.Card.load(kept) == shards.Card.load(root)
    fetched = sorted(kept.rglob("*.mds"))
    assert len(fetched) >= 4 and not list(kept.rglob("*.zstd")) and not list(kept.rglob(".tmp*"))

    # What was fetched is used again; what was cut off, or is of an older data set in the same place, is not.
    times = {shard: shard.stat().st_mtime_ns for shard in fetched}
    fetched[0].write_bytes(fetched[0].read_bytes()[:-9])
    del loader
    assert keys_and_text(loader_of(root, *words)) == expected
    assert {shard for shard in fetched if shard.stat().st_mtime_ns != times[shard]} == {fetched[0]}
    shutil.rmtree(root)
    write_set(root, {"a": 30, "b": 14}, compression="zstd", seed=1)
    others = keys_and_text(loader_of(root, *words))
    a = [(key, total) for key, total in others if all(k.startswith("a/") for k in key)]
    assert not {total for _, total in others} & {total for _, total in expected}, a


def test_a_cache_for_plain_shards_and_its_limit(tmp_path: Path) -> None:
    """Shards are copied; those beyond the limit go again, and the data set keeps its own."""
    root = write_set(tmp_path / "set", {"a": 152})
    before = contents(root)
    expected = keys_and_text(loader_of(root))
    limit = 1.2
    loader = loader_of(root, f"data.cache={tmp_path}/cache", f"data.cache_limit={limit}mb", "data.shuffle_block=20")
    assert sum(p.stat().st_size for p in root.rglob("*.mds")) > 2 * limit * 2**20
    assert sorted(k for keys, _ in keys_and_text(loader) for k in keys) == sorted(
        k for keys, _ in expected for k in keys
    )
    # streaming fetches ahead in a thread of its own: one shard more may be there for a while.
    most = limit * 2**20 + max(p.stat().st_size for p in root.rglob("*.mds"))
    assert 0 < sum(p.stat().st_size for p in loader.root.rglob("*.mds")) <= most
    assert contents(root) == before
    shard = next(root.rglob("*.mds"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard}: missing"):
        loader_of(root, f"data.cache={tmp_path}/cache", "data.damaged_shards=0")


def test_a_place_on_object_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://here")
    place = DataLocation.of(load("demo_256", ["data.path=s3://bucket/sets/one/", "data.cache=/cache"])[0].data)
    assert place.origin == "s3://bucket/sets/one" and place.cached
    assert place.root.parent == Path("/cache") and place.root.name.startswith("one-")
    assert os.environ["AWS_ENDPOINT_URL"] == "http://here"
    other = DataLocation.of(load("demo_256", ["data.path=s3://bucket/more/one", "data.cache=/cache"])[0].data)
    assert other.root != place.root


def test_sizes_on_object_storage_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a folder, with fsspec's memory file system in the place of a bucket."""
    import fsspec

    from pretrain.data import location as streams

    root = write_set(tmp_path / "set", {"a": 30})
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/bucket/set", recursive=True)
    monkeypatch.setattr(streams, "is_remote", lambda url: url.startswith("memory://"))
    place = DataLocation("memory://bucket/set", root, cached=True)
    assert check_shards(place, ["a/256"], 0) == []
    shard = sorted((root / "a/256/00000").glob("*.mds"))[0]
    memory.rm(f"/bucket/set/a/256/00000/{shard.name}")
    with pytest.raises(ValueError, match=f"memory://bucket/set/a/256/00000/{shard.name}: missing"):
        check_shards(place, ["a/256"], 0)


# ---- the order, for any number of processes and workers, with real buckets ----


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of pictures in four shapes, encoded by the command; of one shape there are only three."""
    folder = tmp_path_factory.mktemp("buckets")
    for source, shapes in (
        ("a", {(300, 300): 21, (400, 300): 13, (170, 440): 9}),
        ("b", {(300, 300): 11, (700, 300): 3}),
    ):
        (folder / source).mkdir()
        sizes = [size for size, count in shapes.items() for _ in range(count)]
        random.Random(source).shuffle(sizes)
        with webdataset.TarWriter(f"{folder}/{source}/00000.tar") as tar:
            for i, (size, scene) in enumerate(zip(sizes, scenes(len(sizes), seed=3), strict=True)):
                out = io.BytesIO()
                draw(scene, 700).resize(size).save(out, "JPEG", quality=90)
                tar.write({"__key__": f"{i:04d}", "jpg": out.getvalue(), "txt": scene.caption})
    sources = {s: {"tars": f"{folder}/{s}/*.tar"} for s in "ab"}
    (folder / "sources.yaml").write_text(json.dumps({"sources": sources}))
    words = ["--sources", f"{folder}/sources.yaml", "--output", f"{folder}/set", "--encoders", "tiny", "--buckets"]
    assert encode.main([*words, "--resolutions", "256", "--decoders", "1", "--shard-mb", "1"]) == 0
    return folder / "set"


def test_the_order_for_any_processes_and_workers(bucketed: Path, tmp_path: Path) -> None:
    """The same global batches in the same order, in this and the next epoch, and from any step on."""
    # 23 samples: two processes are given 12 each, and must not make a sixth step of it.
    plain = write_set(tmp_path / "set", {"a": 14, "b": 9})
    cases = {
        "plain": ([f"data.path={plain}"], 5),
        "mixed": ([f"data.path={plain}", "data.sources={a: 0.25, b: 0.75}"], 5),
        "buckets": ([f"data.path={bucketed}"], 5 + 3 + 2 + 2),
        "mixed buckets": ([f"data.path={bucketed}", "data.sources={a: 0.25, b: 0.75}"], 13),
        "canonical": ([f"data.path={bucketed}", "data.canonical_nodes=2"], 12),
    }
    jobs = [
        {"words": [*words, f"data.workers={workers}"], "start": start, "steps": 2 * per_epoch - start[1]}
        for words, per_epoch in cases.values()
        for workers, start in ((0, [0, 0]), (2, [0, 0]), (2, [0, 3]))
    ]
    broken = write_set(tmp_path / "broken", {"a": 14})
    next(broken.rglob("*.mds")).unlink()
    jobs.append({"words": [f"data.path={broken}", "data.damaged_shards=0"]})
    one, two = orders(jobs, 1, tmp_path), orders(jobs, 2, tmp_path)
    assert all("1 shards are missing or cut" in said[-1] for said in (*one, *two)), "no process waits for the others"
    for i, (name, (_, per_epoch)) in enumerate(cases.items()):
        whole = joined([one[0][3 * i]])
        assert one[0][3 * i]["steps_per_epoch"] == per_epoch, name
        assert [at for _, _, at in whole] == [[epoch, step + 1] for epoch in (0, 1) for step in range(per_epoch)]
        assert whole[:per_epoch] != whole[per_epoch:]
        for job, skipped in ((3 * i, 0), (3 * i + 1, 0), (3 * i + 2, 3)):
            for by_process in (one, two):
                assert joined([p[job] for p in by_process]) == whole[skipped:], (name, jobs[job], len(by_process))
                assert all(p[job]["fingerprint"] == one[0][3 * i]["fingerprint"] for p in by_process)
        for keys, shapes, _ in whole:
            assert len(shapes) == 1 and len(keys) == 4
            assert len({json.dumps(k) for k in keys}) == 4, "a sample that comes again has another seed"
    shapes = {tuple(shapes[0]) for _, shapes, _ in joined([one[0][6]])}
    assert shapes == {(4, 32, 32), (4, 28, 36), (4, 52, 20)}
    of_b = Counter(key.startswith("b/") for keys, _, _ in joined([one[0][9]])[:13] for key, _ in keys)
    assert of_b[True] == 4 * 10  # 0.75 of 13 steps


def test_buckets_are_those_of_the_pictures(bucketed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(shards.Card.load(bucketed).sets) == 5
    loader = loader_of(bucketed, global_batch=4, micro=2)
    said = capsys.readouterr().out
    assert "1 of 5 sets cannot fill one global batch of 4 and are left out: 3 of 57 samples (5.26%)" in said
    seen: dict[tuple[int, ...], set[str]] = {}
    for _ in range(3):
        for batch in epoch_of(loader):
            seen.setdefault(tuple(batch.mean_BCHW.shape[-2:]), set()).update(batch.keys)
    # Each epoch leaves over some of a set, but not the same ones.
    assert {shape: len(keys) for shape, keys in seen.items()} == {(32, 32): 21 + 11, (28, 36): 13, (52, 20): 9}


def test_training_on_buckets(bucketed: Path, train: Callable[..., Any], tmp_path: Path) -> None:
    """Real steps over all shapes, into the second epoch."""
    words = [*SMALL, f"data.path={bucketed}", f"run_dir={tmp_path / 'run'}", "data.workers=2", "steps=13"]
    assert "3 of 57 samples" in train("demo_256", *words).output
    losses = scalars(tmp_path / "run", "train/loss")
    assert list(losses) == list(range(1, 14))
    assert all(0 < loss < 10 for loss in losses.values())


def test_buckets_that_the_patch_does_not_divide(bucketed: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    card = json.loads((bucketed / shards.CARD).read_text())
    card["sets"]["a/256_14x18"]["bucket"] = [15, 17]
    (root / shards.CARD).write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"patch: the data set has pictures of 240 × 272 px, .* divisible by 32"):
        loader_of(root)
    with pytest.raises(ValueError, match=r"data\.canonical_nodes: 3 must divide the global batch of 8"):
        loader_of(bucketed, "data.canonical_nodes=3")


def test_bench(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--samples", "24", "--text-width", "8", "--batch", "4", "--workers", "0", "--rounds", "1"]
    assert bench(["loader", *words, "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines[1:]] == [
        "",
        "ours",
        "bare, sent",
        "bare, not sent",
        "padded MDS",
        "padded npz",
    ]
    assert not list(tmp_path.iterdir())
