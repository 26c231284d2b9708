"""The loader: what an epoch is, the order for any number of processes and workers, buckets, sources, and the cache."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from data_sets import epoch_of, joined, loader_of, orders, slots, write_set
from streaming import StreamingDataset
from support import SMALL, scalars

from data_prep import encode, schema
from data_prep.shapes import draw, scenes
from pretrain.bench.__main__ import main as bench
from pretrain.data import loader as module
from pretrain.state import DataPosition

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
            assert torch.equal(text, schema.text_of(row, dtype))
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
    assert loader.data.sources == ["a", "b"]
    assert all(batch.sources == tuple("ab".index(key[0]) for key in batch.keys) for batch in first)
    assert sum(counts.values()) == 168
    assert abs(counts["a"] - 68) <= 2 and abs(counts["b"] - 102) <= 2  # of 170, of which two are left over
    repeats = Counter(keys)
    assert {n for key, n in repeats.items() if key.startswith("b")} <= {4, 5, 6}
    assert {n for key, n in repeats.items() if key.startswith("a")} == {1}
    seeds = [seed for batch in first for seed in batch.seeds]
    assert len(set(seeds)) == len(seeds)
    assert loader.position == DataPosition(0, 21)
    second = {key for batch in epoch_of(loader) for key in batch.keys if key.startswith("a")}
    assert second != {key for key in repeats if key.startswith("a")}
    # The same weights in other words are the same order; other weights are not.
    prints = [
        loader_of(root, f"data.sources={{{s}}}").fingerprint["draws"]
        for s in ("b: 3, a: 2", "a: 4, b: 6", "a: 1, b: 1")
    ]
    assert loader.fingerprint["draws"] == prints[0] == prints[1] != prints[2]
    json.dumps(loader.fingerprint)


def test_the_position_is_the_next_steps(tmp_path: Path) -> None:
    """It moves before a step is used, and over an epoch's end; a resumed loader goes on with exactly the rest."""
    root = write_set(tmp_path / "set", {"a": 20})
    loader, seen = loader_of(root), []
    for step, _ in zip(loader, range(5), strict=False):
        seen.append((slots(step), loader.position))
    places = [(position.epoch, position.step_in_epoch) for _, position in seen]
    assert places == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1)]
    for i, (_, position) in enumerate(seen[:-1]):
        again = loader_of(root)
        again.resume(position)
        assert slots(next(iter(again))) == seen[i + 1][0]


def test_a_rollback_changes_order_and_noise(tmp_path: Path) -> None:
    """The samples are the same, in another order and with other seeds; each rollback is another one."""
    root = write_set(tmp_path / "set", {"a": 16})
    epochs = []
    for rollbacks in (0, 1, 2, 1):
        loader = loader_of(root)
        loader.resume(DataPosition(), rollbacks)
        epochs.append(slots(epoch_of(loader)))
    assert epochs[1] == epochs[3]
    assert len({tuple(key for key, _ in e) for e in epochs}) == 3
    assert len({frozenset(key for key, _ in e) for e in epochs}) == 1
    seeds = [{seed for _, seed in e} for e in epochs[:3]]
    assert not (seeds[0] & seeds[1] | seeds[0] & seeds[2] | seeds[1] & seeds[2])


def test_the_loaders_processes_live_over_epochs_and_rollbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes in all; what they read is what is read without them, in a pass that is left in its middle, too."""
    root = write_set(tmp_path / "set", {"a": 40})
    monkeypatch.setattr(module, "ignore_signals", lambda worker: (tmp_path / f"pid_{os.getpid()}").touch())

    def read(workers: int) -> list[Any]:
        loader, seen = loader_of(root, f"data.workers={workers}", "data.timeout=120"), []
        for position, rollbacks, steps in (
            (DataPosition(), 0, 12),
            (DataPosition(1, 2), 1, 1),
            (DataPosition(1, 3), 2, 7),
        ):
            loader.resume(position, rollbacks)
            seen += [(slots(step), loader.position) for _, step in zip(range(steps), loader, strict=False)]
        return seen

    assert read(2) == read(0)
    assert len(list(tmp_path.glob("pid_*"))) == 2


@pytest.mark.parametrize(
    "word",
    ["seed=1", "data.shuffle_block=64", "data.canonical_nodes=2", "data.sources={a: 1, b: 2}"],
)
def test_the_fingerprint_has_all_that_the_order_depends_on(word: str, tmp_path: Path) -> None:
    """And nothing that it does not depend on: workers, or the samples of a micro-batch."""
    root = write_set(tmp_path / "set", {"a": 40, "b": 40})
    plain, other = loader_of(root), loader_of(root, word)
    assert slots(epoch_of(other)) != slots(epoch_of(plain)) and other.fingerprint != plain.fingerprint
    same = loader_of(root, "data.workers=1", micro=2)
    assert slots(epoch_of(same)) == slots(epoch_of(loader_of(root))) and same.fingerprint == plain.fingerprint
    assert loader_of(root, global_batch=4).fingerprint != plain.fingerprint


def test_an_epoch_that_ends_early_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of streaming that fails ends an epoch as if it were done."""
    loader = loader_of(write_set(tmp_path / "set", {"a": 40}), "data.workers=0")
    whole = type(loader.data).__iter__
    monkeypatch.setattr(type(loader.data), "__iter__", lambda data: itertools.islice(whole(data), 17))
    with pytest.raises(RuntimeError, match="epoch 0 ended after 2 of 5 steps: a thread of streaming failed"):
        epoch_of(loader)


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
    tars, held_out = write_set(tmp_path / "tars", {"a": 32, "b": 24}, tars=8), "data.validation_samples=8"
    cases = {
        "plain": ([f"data.path={plain}"], 5),
        "mixed": ([f"data.path={plain}", "data.sources={a: 0.25, b: 0.75}"], 5),
        "buckets": ([f"data.path={bucketed}"], 5 + 3 + 2 + 2),
        "mixed buckets": ([f"data.path={bucketed}", "data.sources={a: 0.25, b: 0.75}"], 13),
        "canonical": ([f"data.path={bucketed}", "data.canonical_nodes=2"], 12),
        "a share held out": ([f"data.path={tars}", "data.validation=0.6", held_out], 8),
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
    assert all("1 shard missing or cut" in said[-1] for said in (*one, *two)), "no process waits for the others"
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
    assert len(schema.Card.load(bucketed).sets) == 5
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
    card = json.loads((bucketed / schema.CARD).read_text())
    card["sets"]["a/256_14x18"]["bucket"] = [15, 17]
    (root / schema.CARD).write_text(json.dumps(card))
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
