"""One sample from its shard: every flipped byte is noticed, and so is a shard that is cut off or lost."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_sets import SET, entry, file_of, flip, places
from streaming.base.format.mds.reader import MDSReader

from data_prep.common import mds
from pretrain.data.location import DataLocation
from pretrain.data.shard_index import ShardIndex
from pretrain.data.shard_reader import SetStream, Shard


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


def test_a_shard_that_is_cut_off_names_the_place(root: Path) -> None:
    """Samples before the cut are read; of the others the reason is said, as of one whose place cannot be."""
    file = file_of(root, 1)
    shard, at = Shard(MDSReader.from_json(str(root / SET), None, entry(root, 1))), places(file)
    os.truncate(file, int(at[6]) + 100)
    assert shard[5]["key"] == keys_in_order(root)[5]
    with pytest.raises(ValueError, match=f"its shard is cut off before byte {at[7]}"):
        shard[6]
    os.truncate(file, 10)
    with pytest.raises(ValueError, match="its place is said to be bytes 0 to 0 of"):
        shard[6]


def keys_in_order(root: Path) -> list[str]:
    """The keys of shard 1, from a reader of a whole copy of it."""
    return [f"a/{i:04d}" for i in range(entry(root, 0)["samples"], 40)]


def test_bytes_are_those_of_streamings_reader(root: Path) -> None:
    """In memory that may be written: torch makes tensors of it without a copy."""
    theirs = MDSReader.from_json(str(root / SET), None, entry(root, 0))
    ours = Shard(theirs)
    for i in range(len(theirs)):
        data = ours.get_sample_data(i)
        assert bytes(data) == theirs.get_sample_data(i) and not data.readonly


# ---- fetching a shard ----


def index_of(root: Path) -> ShardIndex:
    return ShardIndex.read(root / SET / "index.json")


def reader_of(root: Path, number: int) -> Shard:
    return Shard(MDSReader.from_json(str(root / SET), None, entry(root, number)))


def test_a_missing_shard_of_a_folder_is_lost(root: Path) -> None:
    """First streaming is told that the file is not there; then it asks for it, and the reading says why there is none."""
    shard = reader_of(root, 1)
    file_of(root, 1).unlink()
    with pytest.raises(FileNotFoundError):
        shard[0]
    stream = SetStream(DataLocation(str(root), root, cached=False), SET, index_of(root), choose=8)
    assert stream.remote is None and stream.name == SET
    assert stream.prepare_shard(shard) == 0
    with pytest.raises(ValueError, match="its shard is missing"):
        shard[0]


def test_a_shard_that_cannot_be_fetched_is_asked_for_once(root: Path, tmp_path: Path) -> None:
    origin = shutil.copytree(root, tmp_path / "origin")
    cache = tmp_path / "cache"
    location = DataLocation(str(origin), cache, cached=True)
    (cache / SET).mkdir(parents=True)
    shutil.copy(root / SET / "index.json", cache / SET)
    stream = SetStream(location, SET, index_of(origin), choose=8)
    stream.apply_default(
        {"split": None, "download_retry": 1, "download_timeout": 60, "validate_hash": None, "keep_zip": False}
    )
    shard = Shard(MDSReader.from_json(str(cache / SET), None, entry(root, 1)))
    file_of(origin, 1).rename(tmp_path / "away")
    assert stream.prepare_shard(shard) == 0
    assert shard.lost is not None and shard.lost.startswith("its shard cannot be fetched (FileNotFoundError: ")
    (tmp_path / "away").rename(file_of(origin, 1))
    assert stream.prepare_shard(shard) == 0
    with pytest.raises(ValueError, match="its shard cannot be fetched"):
        shard[0]
    other = Shard(MDSReader.from_json(str(cache / SET), None, entry(root, 2)))
    grown = stream.prepare_shard(other)
    assert (other.lost, grown) == (None, file_of(origin, 2).stat().st_size)
    assert other[0]["key"] == "a/" + f"{40 - len(other):04d}"
