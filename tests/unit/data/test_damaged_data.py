"""Damaged and missing shards: noticed, replaced within the budget, the same for any processes, and all other samples stay."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import epoch_of, joined, loader_of, orders, write_set
from streaming.base.format.mds.reader import MDSReader

from data_prep import schema as shards
from data_prep.common import mds
from pretrain.data.loader import Batch, Loader, Position
from pretrain.data.shard_reader import Damage, Shard
from pretrain.data.shared_memory import FIRST, remove_stale_names

SET = "a/256"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 samples of one set, in three shards."""
    return write_set(tmp_path_factory.mktemp("whole") / "set", {"a": 40})


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "set")


def entry(root: Path, number: int, set_: str = SET) -> dict[str, Any]:
    return json.loads((root / set_ / shards.INDEX).read_text())["shards"][number]


def file_of(root: Path, number: int, set_: str = SET) -> Path:
    about = entry(root, number, set_)
    return root / set_ / (about["zip_data"] or about["raw_data"])["basename"]


def keys_in(root: Path, number: int, set_: str = SET) -> list[str]:
    """The keys of a shard's samples, in order."""
    about = entry(root, number, set_)
    columns = dict(zip(about["column_names"], about["column_encodings"], strict=True))
    return [row["key"] for row in mds.rows_of(file_of(root, number, set_).read_bytes(), about, columns)]


def places(shard: Path) -> np.ndarray:
    """Where a shard's samples begin, and the last ends."""
    raw = shard.read_bytes()
    return np.frombuffer(raw, "<u4", int.from_bytes(raw[:4], "little") + 1, 4)


def flip(file: Path, at: int, bit: int = 0) -> None:
    with file.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1 << bit]))


# ---- one sample ----


def test_every_flipped_byte_of_a_sample_is_noticed(root: Path) -> None:
    """Of its place in the shard's table with every bit, of the sizes in front of its columns with every bit, of all else."""
    file, about, chance = file_of(root, 1), entry(root, 1), random.Random(0)
    shard, number = Shard(MDSReader.from_json(str(root / SET), None, about)), 5
    begin, end = places(file)[number : number + 2].tolist()
    sizes = 4 * about["column_sizes"].count(None)
    assert sizes == 20 and end - begin > 16 << 10
    header = [
        (at, bit) for at in (*range(4 + 4 * number, 12 + 4 * number), *range(begin, begin + sizes)) for bit in range(8)
    ]
    expected = shard[number]
    for at, bit in (*header, *((at, chance.randrange(8)) for at in range(begin + sizes, end))):
        flip(file, at, bit)
        with pytest.raises(ValueError, match=r"crc32 is not|its place is|do not even hold the sizes"):
            shard[number]
        flip(file, at, bit)
    again = shard[number]
    assert again.keys() == expected.keys()
    assert all(np.array_equal(again[name], value) for name, value in expected.items())
    assert mds.CRC in again


def test_two_flipped_sizes_that_add_up_are_noticed(root: Path) -> None:
    """The bytes of all columns would be the same ones, split elsewhere."""
    file, about = file_of(root, 0), entry(root, 0)
    shard, begin = Shard(MDSReader.from_json(str(root / SET), None, about)), int(places(file)[2])
    raw = bytearray(file.read_bytes())
    first, second = np.frombuffer(raw, "<u4", 2, begin)
    raw[begin : begin + 8] = np.array([first - 1, second + 1], "<u4").tobytes()
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="crc32 is not that of its bytes"):
        shard[2]


# ---- an epoch ----

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


def slots(batches: list[Batch]) -> list[tuple[str, int]]:
    return [slot for batch in batches for slot in zip(batch.keys, batch.seeds, strict=True)]


def damages_of(batches: list[Batch]) -> list[Damage]:
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
        assert loader.position == Position(epoch, 5)
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
    assert loader.position == Position(0, 5)
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


# ---- the budget ----


def test_the_budget_at_the_start(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _missing(root)
    said = (
        r"2 shards are missing or cut, data\.damaged_shards allows 1; data_prep/verify\.py --repair makes them again:\n"
    )
    with pytest.raises(ValueError, match=said):
        loader_of(root, "data.damaged_shards=1")
    assert not capsys.readouterr().out
    loader_of(root, "data.damaged_shards=2")
    notes = [line for line in capsys.readouterr().out.splitlines() if "shard" in line]
    assert [re.search(r"shard\.\d+\.mds: missing, expected \d+ bytes", line) is not None for line in notes] == [
        True,
        True,
    ]


# ---- a cache ----


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
    assert loader.position == Position(0, 5)
    assert {d.shard for d in damages_of(batches)} == set(damaged)
    lost = {*keys_in(whole, 0), *(keys_in(whole, 2) if compression else keys_in(whole, 2)[3:4])}
    for was, now in zip(slots(epoch_of(loader_of(whole))), slots(batches), strict=True):
        assert (was == now) == (was[0] not in lost)


def test_a_cache_has_one_training(root: Path, tmp_path: Path) -> None:
    """Another process has it; once that is killed, it is free."""
    words = f"data.cache={tmp_path}/cache"
    kept = loader_of(root, words).root
    hold = f"import fcntl, sys; f = open({str(kept / 'in-use')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match=rf"data\.cache: {kept} is in use by another training on this node"):
            loader_of(root, words)
        other.kill()
    assert len(epoch_of(loader_of(root, words))) == 10


# ---- names in /dev/shm ----


def names(loader: Loader) -> set[str]:
    """What of the loader's is in /dev/shm."""
    prefix = f"{loader.data._shm_prefix_int:06}_"
    return {path.name.removeprefix(prefix) for path in Path("/dev/shm").glob(f"{prefix}*")}


def test_two_loaders_share_no_names(root: Path) -> None:
    """Nor does a position pass through a name that somebody else may remove."""
    one, other = loader_of(root), loader_of(root)
    numbers = {loader.data._shm_prefix_int for loader in (one, other)}
    assert len(numbers) == 2 and min(numbers) >= FIRST
    one.resume(Position(0, 2))
    rest = epoch_of(other)[4:]
    for step, expected in zip(one, (rest[i : i + 2] for i in range(0, 6, 2)), strict=False):
        assert slots(step) == slots(expected)
        assert {"locals", "barrier", "shard_states"} <= names(one) and "resume" not in names(one)
        if one.position.step_in_epoch == 5:
            break
    assert one.position == Position(0, 5)


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[Path]:
    """A file as of a living run: this process maps it."""
    path = tmp_path / "memory/000007_barrier"
    path.parent.mkdir()
    path.write_bytes(bytes(12))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 12):
        yield path


def test_what_killed_runs_left_is_removed(mapped: Path, tmp_path: Path) -> None:
    memory, locks = mapped.parent, tmp_path / "locks"
    locks.mkdir()
    stale = [memory / "000001_locals", memory / "123456789_shard_access_times", locks / "000001_barrier_filelock"]
    stale += [locks / "123456789_cache_filelock"]
    kept = [memory / "0001_locals", memory / "psm_12345678", locks / "000007_cache_filelock", locks / "000002_other"]
    young, locked = [memory / "000003_locals", locks / "000004_cache_filelock"], locks / "000005_barrier_filelock"
    for path in (*stale, *kept, *young, locked):
        path.touch()
    stale[0].write_bytes(b"x" * 100)
    past = time.time() - 100
    for path in (*stale, *kept, locked, mapped):
        os.utime(path, (past, past))
    with locked.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remove_stale_names(memory, locks) == 100
    assert {*memory.iterdir(), *locks.iterdir()} == {mapped, *kept, *young, locked}
