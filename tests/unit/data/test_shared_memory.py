"""Names in /dev/shm: no two runs have the same ones, and those of killed runs are removed."""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_sets import epoch_of, loader_of, slots
from streaming.base.shared import prefix

from pretrain.data import shared_memory
from pretrain.data.loader import Loader
from pretrain.data.shared_memory import FIRST, LAST, remove_stale_names, unique_names
from pretrain.distributed.world import World
from pretrain.state import DataPosition


def names(loader: Loader) -> set[str]:
    """What of the loader's is in /dev/shm."""
    prefix = f"{loader.data._shm_prefix_int:06}_"
    return {path.name.removeprefix(prefix) for path in Path("/dev/shm").glob(f"{prefix}*")}


def test_two_loaders_share_no_names(root: Path) -> None:
    """Nor does a position pass through a name that somebody else may remove."""
    one, other = loader_of(root), loader_of(root)
    numbers = {loader.data._shm_prefix_int for loader in (one, other)}
    assert len(numbers) == 2 and min(numbers) >= FIRST
    one.resume(DataPosition(0, 2))
    rest = epoch_of(other)[4:]
    for step, expected in zip(one, (rest[i : i + 2] for i in range(0, 6, 2)), strict=False):
        assert slots(step) == slots(expected)
        assert {"locals", "barrier", "shard_states"} <= names(one) and "resume" not in names(one)
        if one.position.step_in_epoch == 5:
            break
    assert one.position == DataPosition(0, 5)


def test_a_number_of_its_own_for_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn anew each time, above what streaming and others count up to, and of process 0 for all processes."""
    numbers = []
    for _ in range(50):
        with unique_names(World.alone()):
            numbers.append(next(iter(prefix._each_prefix_int())))
    assert len(set(numbers)) == 50 and all(FIRST <= n <= LAST for n in numbers)
    monkeypatch.setattr(shared_memory, "broadcast", lambda item, world: FIRST + 5)  # as in another process
    with unique_names(World.alone()):
        assert next(iter(prefix._each_prefix_int())) == FIRST + 5
    assert next(iter(prefix._each_prefix_int())) == 0


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
