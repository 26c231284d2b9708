"""Check of the shard files at the start: each looked at once over all processes, and each missing or cut one named by all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from data_sets import SET, file_of, write_set
from shard_looks import note_looks
from support import ended, fork, free_port, launcher

from data_prep import schema
from pretrain.data import shard_check
from pretrain.data.location import DataLocation
from pretrain.data.shard_check import check_shards
from pretrain.data.shard_index import ShardIndex
from pretrain.distributed.world import World

ALONE = World.alone()


def indexes_of(root: Path) -> dict[str, ShardIndex]:
    return {SET: ShardIndex.read(root / SET / schema.INDEX)}


def test_what_is_no_file_is_missing(root: Path) -> None:
    """A folder or a link to nothing in a shard's place is no shard."""
    indexes, location = indexes_of(root), DataLocation(str(root), root, cached=False)
    assert check_shards(location, indexes, 0, ALONE) == []
    for number in (0, 1):
        file_of(root, number).unlink()
    file_of(root, 0).mkdir()
    file_of(root, 1).symlink_to("nowhere")
    said = check_shards(location, indexes, 2, ALONE)
    assert len(said) == 2 and all(": missing, expected" in line for line in said)
    with pytest.raises(ValueError, match=r"2 shards missing or cut, data\.damaged_shards allows 1"):
        check_shards(location, indexes, 1, ALONE)


def test_only_ten_are_listed(root: Path) -> None:
    index = indexes_of(root)[SET]
    shutil.rmtree(root / SET / "00000")
    sets = {f"{n}/256": index for n in "abcd"}
    with pytest.raises(ValueError, match=r"12 shards missing(.|\n)*\n  and 2 more$") as raised:
        check_shards(DataLocation(str(root), root, cached=False), sets, 3, ALONE)
    assert str(raised.value).count("missing, expected") == 10


def test_sizes_on_object_storage_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a folder, with fsspec's memory file system in the place of a bucket."""
    import fsspec

    root = write_set(tmp_path / "set", {"a": 30})
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/bucket/set", recursive=True)
    monkeypatch.setattr(shard_check, "is_remote", lambda url: url.startswith("memory://"))
    place = DataLocation("memory://bucket/set", root, cached=True)
    assert check_shards(place, indexes_of(root), 0, ALONE) == []
    shard = sorted((root / "a/256/00000").glob("*.mds"))[0]
    memory.rm(f"/bucket/set/a/256/00000/{shard.name}")
    with pytest.raises(ValueError, match=f"memory://bucket/set/a/256/00000/{shard.name}: missing"):
        check_shards(place, indexes_of(root), 0, ALONE)


# ---- two processes ----


def test_two_processes_share_the_work(root: Path, tmp_path: Path) -> None:
    bad, (log, *outs) = shutil.copytree(root, tmp_path / "bad"), [tmp_path / name for name in ("log", "0", "1")]
    names = [file_of(root, number).name for number in range(3)]
    file_of(bad, 0).unlink()
    os.truncate(file_of(bad, 2), 9)
    port = str(free_port())
    processes = [fork(log, note_looks, root, bad, out, **launcher(rank, 2, port)) for rank, out in enumerate(outs)]
    assert set(ended(processes)) == {0}, log.read_text()
    first, second = (json.loads(out.read_text()) for out in outs)

    assert first["looked"] and second["looked"] and sorted(first["looked"] + second["looked"]) == names
    assert first["read"] == [str(root / SET / schema.INDEX)] and not second["read"]
    assert not first["read again"] and not second["read again"]
    digest = hashlib.sha256((root / SET / schema.INDEX).read_bytes()).hexdigest()
    assert first["hashes"] == second["hashes"] == [{SET: digest}] * 2

    assert sorted(first["shared looked"] + second["shared looked"]) == names
    for said in (first, second):
        missing, cut = said["shared"]
        assert f"{file_of(bad, 0)}: missing, expected" in missing and f"{file_of(bad, 2)}: 9 bytes, expected" in cut
        assert "2 shards missing or cut, data.damaged_shards allows 1" in said["shared refused"]

    # Each has a folder of its own, as on two nodes' disks: both look at all shards, and hear of the other's.
    assert first["own looked"] == second["own looked"] == names
    for said in (first, second):
        assert [line.split(": ")[2].split(",")[0] for line in said["own"]] == ["missing", "9 bytes"]
        assert "2 shards missing or cut" in said["own refused"]
