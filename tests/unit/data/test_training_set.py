"""Samples in their places with their seeds; damaged and missing ones noticed, replaced within the budget, for any processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_sets import SET, entry, epoch_of, file_of, flip, joined, keys_in, loader_of, orders, places, slots, write_set

from data_prep import schema
from pretrain.data.batch import Batch
from pretrain.data.shard_reader import UnreadableSample
from pretrain.data.training_set import sample_seed
from pretrain.state import DataPosition

# ---- seeds and captions ----


@pytest.mark.parametrize(
    ("seed", "epoch", "key", "expected"),
    [
        (0, 0, "a/0000", 24585231275909551),
        (0, 1, "a/0000", 18631454110078355),
        (7, 0, "a/0000", 42282881536007885),
        (0, 0, "a/0000/1", 64337806533687350),
    ],
)
def test_seeds_are_those_of_runs_that_are_there(seed: int, epoch: int, key: str, expected: int) -> None:
    """A run that goes on after an update draws the noise that it would have drawn before."""
    assert sample_seed(seed, epoch, key) == expected < 2**56


def test_a_pass_has_the_epoch_and_seed_that_it_is_given(whole: Path) -> None:
    data = loader_of(whole, "data.caption_dropout=0").data
    keys = []
    for epoch, seed in ((0, 5), (1, 5), (0, 6)):
        data.start_at(epoch, 0, seed)
        samples = list(data)
        assert all(s.seed == sample_seed(seed, epoch, s.key) for s in samples)
        keys.append([s.key for s in samples])
    assert len({tuple(k) for k in keys}) == 3 and len({tuple(sorted(k)) for k in keys}) == 1
    data.start_at(0, 8, 5)
    assert [s.key for s in data] == keys[0][8:]


def test_captions_are_dropped_by_the_loader(tmp_path: Path) -> None:
    """The share of `data.caption_dropout`: others in another epoch, and the same ones in a run that goes on there."""
    root = write_set(tmp_path / "set", {"a": 300})
    null = schema.load_null_text(root)
    loader = loader_of(root, "data.caption_dropout=0.3")

    def dropped(epoch: int) -> set[str]:
        loader.resume(DataPosition(epoch, 0))
        pairs = [pair for b in epoch_of(loader) for pair in zip(b.keys, b.text.captions(), strict=True)]
        return {key for key, text in pairs if torch.equal(text, null)}

    first, second = dropped(0), dropped(1)
    assert all(60 < len(keys) < 120 for keys in (first, second))  # four standard deviations: 8 each
    assert first != second and dropped(0) == first


# ---- damage in an epoch ----

Damaging = Callable[[Path], list[tuple[int, list[int]]]]  # a copy of the set; gives shards and their damaged samples


def _payload(root: Path) -> list[tuple[int, list[int]]]:
    flip(file_of(root, 1), int(places(file_of(root, 1))[3]) + 5000)
    return [(1, [3])]


def _size_header(root: Path) -> list[tuple[int, list[int]]]:
    flip(file_of(root, 0), int(places(file_of(root, 0))[7]) + 7, bit=7)
    return [(0, [7])]


def _offset_table(root: Path) -> list[tuple[int, list[int]]]:
    flip(file_of(root, 2), 4 + 4 * 4 + 3, bit=6)  # where sample 3 ends and 4 begins
    return [(2, [3, 4])]


def _cut(root: Path) -> list[tuple[int, list[int]]]:
    file = file_of(root, 1)
    at = places(file)
    os.truncate(file, int(at[6]) + 100)
    return [(1, list(range(6, len(at) - 1)))]


def _missing(root: Path) -> list[tuple[int, list[int]]]:
    count = [entry(root, number)["samples"] for number in (0, 2)]
    for number in (0, 2):
        file_of(root, number).unlink()
    return [(0, list(range(count[0]))), (2, list(range(count[1])))]


def damages_of(batches: list[Batch]) -> list[UnreadableSample]:
    return [damage for batch in batches for damage in batch.damaged]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [_payload, _size_header, _offset_table, _cut, _missing])
def test_only_what_is_damaged_is_replaced(
    damage: Damaging, workers: int, whole: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs: whole ones, every other sample in its place with its seed, the batches say what was damaged."""
    found = damage(root)
    words = (f"data.workers={workers}", "data.timeout=60")
    before, loader = loader_of(whole, *words), loader_of(root, *words)
    said = capsys.readouterr().out
    for number, _ in found:
        cut = damage is _cut or damage is _missing
        assert said.count(f"data: {file_of(root, number)}: ") == cut
    lost = {keys_in(whole, number)[i] for number, samples in found for i in samples}
    stood_in = []
    for epoch in (0, 1):
        expected, batches = epoch_of(before), epoch_of(loader)
        assert loader.position == DataPosition(epoch, 5)
        pairs = list(zip(slots(expected), slots(batches), strict=True))
        assert all((was == now) == (was[0] not in lost) for was, now in pairs)
        assert not lost & {key for _, (key, _) in pairs}, "nothing damaged is trained on"
        told = {(d.shard, d.sample) for d in damages_of(batches)}
        names = {number: file_of(root, number).relative_to(root).as_posix() for number, _ in found}
        assert {(names[number], i) for number, samples in found for i in samples} <= told
        assert {shard for shard, _ in told} == set(names.values())
        stood_in.append([now for was, now in pairs if was[0] in lost])
        assert all(isinstance(d.reason, str) and "\n" not in d.reason for d in damages_of(batches))
    assert len(stood_in[0]) == len(lost)
    moved = next(batch for batch in batches if batch.damaged).to(torch.device("cpu"), torch.float32)
    assert moved.damaged
    assert not damages_of(epoch_of(before))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_goes_in_mid_epoch(workers: int, whole: Path, root: Path) -> None:
    """The epoch has all its steps. What workers read ahead is read; in the next epoch the whole shard is replaced."""
    words = (f"data.workers={workers}", "data.timeout=60", "data.prefetch=1")
    before, loader = loader_of(whole, *words), loader_of(root, *words)
    lost, gone = set(keys_in(whole, 2)), file_of(root, 2)
    batches: list[Batch] = []
    for _, step in zip(range(5), loader, strict=False):
        batches += step
        if loader.position.step_in_epoch == 1:
            gone.unlink()
    assert loader.position == DataPosition(0, 5)
    for was, now in zip(slots(epoch_of(before)), slots(batches), strict=True):
        assert was == now or was[0] in lost
    assert damages_of(batches) or workers
    again = epoch_of(loader)
    assert {d.shard for d in damages_of(again)} == {gone.relative_to(root).as_posix()}
    assert {d.reason for d in damages_of(again)} == {"its shard is missing"}
    assert not lost & {key for key, _ in slots(again)}


def test_a_set_of_which_nothing_can_be_read(root: Path) -> None:
    loader = loader_of(root, "data.workers=0")
    shutil.rmtree(root / SET / "00000")
    said = r"a/256/00000/shard\.\d+\.mds: sample \d+ cannot be read \(its shard is missing\), nor can any of 32 others"
    with pytest.raises(ValueError, match=said):
        epoch_of(loader)


def test_the_same_for_any_processes(tmp_path: Path) -> None:
    """What stands in, with its seed and the words on the damage, in whole batches of one shape; also from step 3 on."""
    plain, bucketed = write_set(tmp_path / "plain", {"a": 40}), write_set(tmp_path / "set", {"a": 66}, buckets=True)
    file_of(plain, 1).unlink()
    flip(file_of(plain, 2), int(places(file_of(plain, 2))[1]) + 99)
    sets = "a/256_16x16", "a/256_14x18"
    for set_ in sets:
        file_of(bucketed, 0, set_).unlink()
    jobs = [
        {
            "words": [f"data.path={path}", f"data.workers={workers}", "data.timeout=60"],
            "start": start,
            "steps": 14 - start[1],
        }
        for path in (plain, bucketed)
        for workers, start in ((0, [0, 0]), (2, [0, 0]), (2, [0, 3]))
    ]
    one, two = orders(jobs, 1, tmp_path), orders(jobs, 2, tmp_path)
    for first, path in ((0, plain), (3, bucketed)):
        expected = joined([one[0][first]])
        damaged = [sorted(step["damaged"]) for step in one[0][first]["steps"]]
        assert sum(map(len, damaged)) >= 14
        for job, skipped in ((first, 0), (first + 1, 0), (first + 2, 3)):
            for by_process in (one, two):
                assert joined([p[job] for p in by_process]) == expected[skipped:], (path, job, len(by_process))
                steps = zip(*(p[job]["steps"] for p in by_process), strict=True)
                assert [sorted(d for part in parts for d in part["damaged"]) for parts in steps] == damaged[skipped:]
        assert all(len(shapes) == 1 for _, shapes, _ in expected)
    assert {d[0].rpartition("/00000")[0] for step in one[0][3]["steps"] for d in step["damaged"]} == set(sets)


# ---- a damaged origin of a cache ----


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_damaged_at_the_origin(workers: int, compression: str | None, whole: Path, tmp_path: Path) -> None:
    """One is missing; of one a byte is another one, which unpacks to nothing or to a sample with another checksum."""
    root = write_set(tmp_path / "set", {"a": 40}, compression=compression)
    damaged = [file_of(root, number).relative_to(root).as_posix() for number in (0, 2)]
    file_of(root, 0).unlink()
    file = file_of(root, 2)
    if compression:
        file.write_bytes(b"no zstd" + file.read_bytes()[7:])
    else:
        flip(file, int(places(file)[3]) + 999)
    loader = loader_of(root, f"data.cache={tmp_path}/cache", f"data.workers={workers}", "data.timeout=60")
    batches = epoch_of(loader)
    assert loader.position == DataPosition(0, 5)
    assert {d.shard for d in damages_of(batches)} == set(damaged)
    lost = {*keys_in(whole, 0), *(keys_in(whole, 2) if compression else keys_in(whole, 2)[3:4])}
    for was, now in zip(slots(epoch_of(loader_of(whole))), slots(batches), strict=True):
        assert (was == now) == (was[0] not in lost)
