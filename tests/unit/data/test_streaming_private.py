"""Each inner part of streaming that is relied on is there, is what it was, and is reached in one file."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import SET, entry, epoch_of, loader_of, slots, write_set
from private_interfaces import documented, listed, underscored
from streaming import Stream, StreamingDataset
from streaming.base.format.mds.reader import MDSReader
from streaming.base.shared import prefix

from pretrain.data.loader import Loader
from pretrain.data.shard_index import ShardIndex
from pretrain.data.streaming_private import (
    PRIVATE,
    IndexedStream,
    PositionedDataset,
    ShardFile,
    shared_memory_number,
    times_before,
)
from pretrain.state import DataPosition

FILE = "pretrain/data/streaming_private.py"
VERSION = importlib.metadata.version("mosaicml-streaming")


def counts(total: int, length: int) -> Callable[[object], bool]:
    """A table of numbers that add up to `total`."""
    return lambda v: isinstance(v, np.ndarray) and len(v) == length and int(v.sum()) == total


# What each attribute must be, on a real data set of two streams with 32 samples in four shards.
KINDS = {
    "MDSReader.decode_sample": callable,
    "MDSReader.dirname": lambda v: isinstance(v, str) and v.endswith(SET),
    "MDSReader.get_sample_data": callable,
    "MDSReader.raw_data": lambda v: v.basename.endswith(".mds") and v.bytes > 1000,
    "MDSReader.split": lambda v: v == "",
    "MDSReader.zip_data": lambda v: v is None,
    "Stream.apply_default": callable,
    "Stream.get_shards": callable,
    "Stream.local": lambda v: v.endswith(SET),
    "Stream.prepare_shard": callable,
    "Stream.proportion": lambda v: v == 20 / 32,
    "Stream.remote": lambda v: v is None,
    "Stream.set_up_local": callable,
    "Stream.split": lambda v: v == "",
    "StreamingDataset._get_work": callable,
    "StreamingDataset._resume": callable,
    "StreamingDataset.epoch_size": lambda v: v == 32,
    "StreamingDataset.get_item": callable,
    "StreamingDataset.num_samples": lambda v: v == 32,
    "StreamingDataset.resample_streams": callable,
    "StreamingDataset.sample_offset_per_shard": lambda v: v[0] == 0 and (np.diff(v) > 0).all(),
    "StreamingDataset.samples_per_shard": lambda v: counts(32, len(v))(v),
    "StreamingDataset.shard_offset_per_stream": lambda v: v[0] == 0 and len(v) == 2,
    "StreamingDataset.shards": lambda v: all(isinstance(s, MDSReader) for s in v),
    "StreamingDataset.shards_per_stream": lambda v: len(v) == 2 and (v > 0).all(),
    "StreamingDataset.shuffle_seed": lambda v: isinstance(v, int),
    "StreamingDataset.spanner": lambda v: tuple(v[31]) == (len(v.shard_sizes) - 1, v.shard_sizes[-1] - 1),
    "StreamingDataset.stream_per_shard": lambda v: set(v) == {0, 1},
    "streaming.base.shared.prefix._each_prefix_int": lambda v: (
        [n for n, _ in zip(v(), "abc", strict=False)] == [0, 1, 2]
    ),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets."""
    return write_set(tmp_path_factory.mktemp("two") / "set", {"a": 20, "b": 12})


@pytest.fixture(scope="module")
def theirs(two: Path) -> StreamingDataset:
    """streaming's own data set."""
    return StreamingDataset(streams=[Stream(local=f"{two}/{s}/256") for s in "ab"], batch_size=4, shuffle=False)


def indexed(folder: Path, **settings: Any) -> IndexedStream:
    return IndexedStream(ShardIndex.read(folder / "index.json"), ShardFile, local=str(folder), **settings)


@pytest.fixture(scope="module")
def loader(two: Path) -> Loader:
    return loader_of(two, "data.workers=0")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_attribute_is_there(name: str, theirs: StreamingDataset) -> None:
    owner, _, attribute = name.rpartition(".")
    holders = {"MDSReader": theirs.shards[0], "Stream": theirs.streams[0], "StreamingDataset": theirs}
    holder = holders.get(owner, prefix)
    assert hasattr(holder, attribute), f"streaming {VERSION} has no {name}: see docs/dependencies.md"
    value = getattr(holder, attribute)
    assert KINDS[name](value), f"in streaming {VERSION} {name} is {value!r}: see docs/dependencies.md"


def test_the_tables() -> None:
    """The docs, the table in the file, and what is tested here are the same names."""
    assert documented(FILE) == listed(PRIVATE) == set(KINDS)
    assert underscored(FILE) == {"prefix._each_prefix_int"}


# ---- what is made of it ----


def test_a_pass_starts_where_it_is_told(loader: Loader) -> None:
    """streaming asks for the start at each pass, from its own `_resume`."""
    whole = slots(epoch_of(loader))
    loader.resume(DataPosition(0, 2))
    assert slots([batch for _, step in zip(range(2), loader, strict=False) for batch in step]) == whole[16:]


def test_places_and_numbers(loader: Loader) -> None:
    """Each is the other's inverse, for all samples; after a shard's last sample comes its first."""
    data = loader.data
    assert [list(data.shards_of(stream)) for stream in (0, 1)] == [
        [s for s in range(len(data.shards)) if data.stream_per_shard[s] == stream] for stream in (0, 1)
    ]
    for number in range(data.num_samples):
        place = data.place_of(number)
        assert place.shard in data.shards_of(place.stream)
        assert data.number_of(place.shard, place.index) == number
        assert data.number_of(place.shard, place.index + int(data.samples_per_shard[place.shard])) == number
        assert data.place_of(number + 3 * data.num_samples) == place, "a repeat is the same sample"
        assert data[number].key.split("/")[0] == "ab"[place.stream]


def test_repeats_have_numbers_of_their_own(two: Path) -> None:
    """An epoch that draws samples several times has no number twice, and each number's sample as often as streaming's."""
    data = loader_of(two, "data.sources={a: 0.1, b: 0.9}").data
    _, numbers = data.resample_streams(0)
    _, plain = StreamingDataset.resample_streams(data, 0)
    assert len(set(numbers.tolist())) == len(numbers) == len(plain)
    assert sorted((numbers % data.num_samples).tolist()) == sorted(plain.tolist())
    assert len(set(plain.tolist())) < len(plain)


def test_times_before() -> None:
    assert times_before(np.array([5, 3, 5, 5, 3, 0])).tolist() == [0, 0, 1, 2, 1, 0]
    assert times_before(np.array([], np.int64)).tolist() == []
    numbers = np.random.default_rng(0).integers(0, 9, 200)
    assert times_before(numbers).tolist() == [numbers[:i].tolist().count(n) for i, n in enumerate(numbers)]


def test_a_number_in_shared_memory(two: Path) -> None:
    """Taken by a data set that is made within it; afterwards numbers count from 0 again, also after an error."""
    number = 7_654_321 + os.getpid()  # another suite may run on this machine
    with shared_memory_number(number):
        data = PositionedDataset([indexed(two / "a/256")], batch_size=4, shuffle=False)
    assert data._shm_prefix_int == number
    with pytest.raises(KeyError), shared_memory_number(number):
        raise KeyError
    assert next(iter(prefix._each_prefix_int())) == 0


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_shards_file(compression: str | None, tmp_path: Path) -> None:
    """Its names and size are those of the index, read by a copy of streaming's own reader."""
    root = write_set(tmp_path / "set", {"a": 4}, compression=compression)
    about = entry(root, 0)
    shard = ShardFile(MDSReader.from_json(str(root / SET), None, about))
    assert (
        shard.path == str(root / SET / about["raw_data"]["basename"]) and shard.path_bytes == about["raw_data"]["bytes"]
    )
    assert shard.stored_name == (about["zip_data"] or about["raw_data"])["basename"]
    assert shard.stored_name.endswith(".mds.zstd" if compression else ".mds")
    assert len(shard) == 4


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_readers_and_sizes_are_streamings(compression: str | None, tmp_path: Path) -> None:
    """A data set of indexed streams has the shards, samples and bytes on disk that streaming finds by itself."""
    root = write_set(tmp_path / "set", {"a": 40, "b": 12}, compression=compression)
    folders = [root / "a/256", root / "b/256"]
    local = {"remote": None} if compression is None else {}

    def made(stream: Callable[[Path, dict[str, Any]], Stream], place: str) -> list[Stream]:
        streams = []
        for folder in folders:
            here = folder
            if compression:
                here = tmp_path / place / folder.relative_to(root)
                here.mkdir(parents=True)
                shutil.copy(folder / "index.json", here)
            streams.append(stream(here, {"remote": str(folder)} if compression else local))
        return streams

    settings: dict[str, Any] = {"batch_size": 1, "shuffle": False, "num_canonical_nodes": 1}
    theirs = StreamingDataset(streams=made(lambda f, more: Stream(local=str(f), **more), "theirs"), **settings)
    ours = PositionedDataset(made(lambda f, more: indexed(f, **more), "ours"), **settings)
    assert ours.num_samples == theirs.num_samples and len(ours.shards) == len(theirs.shards) > 3
    assert ours.samples_per_shard.tolist() == theirs.samples_per_shard.tolist()
    for mine, its in zip(ours.shards, theirs.shards, strict=True):
        for name, value in vars(its).items():
            if name in ("raw_data", "zip_data"):
                value = value and replace(value, hashes={})
            if name not in ("dirname", "file_pairs"):
                assert getattr(mine, name) == value, name
        assert mine.get_max_size() == its.get_max_size()
    assert [row["key"] for row in ours] == [row["key"] for row in theirs]
    assert ours.cache_usage == theirs.cache_usage
    assert ours.shards[2] is ours.shards[2], "it is kept: what was lost stays lost"


def test_shards_that_must_be_unpickled_are_refused(two: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two / "a/256", tmp_path / "set")
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"str"', '"pkl"'))
    with pytest.raises(ValueError, match="contains an unsafe type: pkl"):
        PositionedDataset([indexed(folder)], batch_size=4, shuffle=False)
