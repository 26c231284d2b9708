"""Index of a set in memory: every entry as the file has it, few bytes a shard, and each index read once in a run."""

from __future__ import annotations

import gc
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from data_sets import SET, write_set

from pretrain.data.shard_index import ShardIndex


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_every_entry_is_kept(compression: str | None, tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", {"a": 40}, compression=compression) / SET / "index.json"
    index, entries = ShardIndex.read(path), json.loads(path.read_text())["shards"]
    assert index.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(index) == len(entries) == 3 and len(index.kinds) == 1 and gc.isenabled()
    for i, entry in enumerate(entries):
        raw, zipped = entry.pop("raw_data"), entry.pop("zip_data")
        assert index.raw[i] == (raw["basename"], raw["bytes"])
        assert index.zipped[i] == (zipped and (zipped["basename"], zipped["bytes"]))
        assert index.stored(i) == (index.zipped[i] if compression else index.raw[i])
        assert entry.pop("samples") == index.samples[i]
        assert entry == index.kinds[index.kind[i]]


def write(path: Path, entries: list[dict[str, Any]], **more: Any) -> Path:
    path.write_text(json.dumps({"version": 2, "shards": entries} | more))
    return path


def entry_of(number: int, **more: Any) -> dict[str, Any]:
    raw = {"basename": f"{number // 73:05d}/shard.{number % 73:05d}.mds", "bytes": 1 << 27, "hashes": {}}
    return {"raw_data": raw, "zip_data": None, "samples": 137, "column_names": ["key"], "compression": None} | more


def test_fifty_bytes_a_shard(tmp_path: Path) -> None:
    index = ShardIndex.read(write(tmp_path / "index.json", [entry_of(i) for i in range(2000)]))
    assert len(pickle.dumps(index)) < 55 * 2000


def test_shards_of_several_kinds(tmp_path: Path) -> None:
    """Some with another column or compressed, in any order."""
    zipped = {"basename": "z", "bytes": 5, "hashes": {}}
    others = [
        {},
        {"column_names": ["text"]},
        {},
        {"zip_data": zipped, "compression": "zstd"},
        {"column_names": ["text"]},
    ]
    index = ShardIndex.read(write(tmp_path / "index.json", [entry_of(i, **more) for i, more in enumerate(others)]))
    assert index.kind.tolist() == [0, 1, 0, 2, 1]
    assert [index.stored(i)[0] for i in range(5)][2:4] == ["00000/shard.00002.mds", "z"]


def test_a_selection_of_shards() -> None:
    """It has all of each shard, in order, and the hash of the whole file; none is a selection, too."""
    entries = [entry_of(0), entry_of(1, column_names=["text"]), entry_of(2, samples=5)]
    index = ShardIndex._of("hash", {"version": 2, "shards": entries})
    some = index.select([False, True, True])
    assert some.sha256 == "hash" and some.file_names() == index.file_names()[1:] and some.samples.tolist() == [137, 5]
    assert [some.kinds[kind]["column_names"] for kind in some.kind] == [["text"], ["key"]]
    assert [some.stored(i) for i in range(2)] == [index.stored(i) for i in (1, 2)]
    assert len(index.select([False] * 3)) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"version": 2', "Expecting"),
        ('{"version": 2}', "shards"),
        ('{"version": 1, "shards": []}', "version 1, not 2"),
        ("[]", "list"),
        (None, "No such file"),
        (json.dumps({"version": 2, "shards": [entry_of(0, samples="many")]}), "many"),
        (json.dumps({"version": 2, "shards": [entry_of(0, raw_data={"basename": 3, "bytes": 1})]}), "AttributeError"),
        (
            json.dumps({"version": 2, "shards": [entry_of(0), entry_of(1, raw_data=None)]}),
            "raw_data of shard 1 names no file",
        ),
    ],
)
def test_a_damaged_index(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"index\.json is damaged \(.*{said}.*; encode the data set again"):
        ShardIndex.read(path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", ".."])
def test_names_outside_of_the_folder(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "index.json", [entry_of(0), entry_of(1, raw_data={"basename": name, "bytes": 1})])
    with pytest.raises(ValueError, match="names files outside of its folder"):
        ShardIndex.read(path)
    path = write(path, [entry_of(0, raw_data={"basename": "a..b/..c", "bytes": 1})])
    assert ShardIndex.read(path).raw[0] == ("a..b/..c", 1)
