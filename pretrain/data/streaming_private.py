"""Inner parts of mosaicml-streaming, reached here and nowhere else; docs/dependencies.md says what breaks without each name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, starmap
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
from streaming import Stream, StreamingDataset
from streaming.base.format import FileInfo, Reader
from streaming.base.format.mds.reader import MDSReader
from streaming.base.shared import prefix

from pretrain.data.passes import Part, draw
from pretrain.data.shard_index import ShardIndex

PRIVATE = {
    "streaming.base.shared.prefix": ("_each_prefix_int",),
    "StreamingDataset": (
        "_get_work",
        "_resume",
        "epoch_size",
        "get_item",
        "num_samples",
        "resample_streams",
        "sample_offset_per_shard",
        "samples_per_shard",
        "shard_offset_per_stream",
        "shards",
        "shards_per_stream",
        "shuffle_seed",
        "spanner",
        "stream_per_shard",
    ),
    "MDSReader": ("decode_sample", "dirname", "get_sample_data", "raw_data", "split", "zip_data"),
    "Stream": (
        "apply_default",
        "get_shards",
        "local",
        "prepare_shard",
        "proportion",
        "remote",
        "set_up_local",
        "split",
    ),
}
"""The names that `pretrain` uses, by their owner: the table of docs/dependencies.md."""


@contextlib.contextmanager
def shared_memory_number(number: int) -> Iterator[None]:
    """Lets a StreamingDataset, within it, try the numbers of its names in shared memory from this one on, not from 0."""
    before = prefix._each_prefix_int
    prefix._each_prefix_int = lambda: count(number)
    try:
        yield
    finally:
        prefix._each_prefix_int = before


class ShardFile(MDSReader):
    """A reader of one shard, with the state of a reader that streaming made."""

    def __init__(self, reader: Reader):
        vars(self).update(vars(reader))

    @property
    def stored_name(self) -> str:
        """The file of the data set within its set: the shard, or the file that it is decompressed from."""
        return (self.zip_data or self.raw_data).basename

    @property
    def path(self) -> str:
        """The uncompressed shard's file on this node."""
        return os.path.join(self.dirname, self.split, self.raw_data.basename)

    @property
    def path_bytes(self) -> int:
        """The bytes of that file, as the index has them."""
        return self.raw_data.bytes


@dataclass(frozen=True, slots=True)
class _ShardSize:
    """What streaming asks of a shard's reader when a data set is made."""

    samples: int
    max_size: int

    def __len__(self) -> int:
        return self.samples

    def get_max_size(self) -> int:
        return self.max_size


class IndexedStream(Stream):
    """A Stream of a set whose index is at hand: the readers of its shards are made when they are asked for.

    streaming's own parses the index in every process and makes all readers at once, two kilobytes each.
    """

    def __init__(self, index: ShardIndex, make_shard: Callable[[Reader], ShardFile], **settings: Any):
        super().__init__(**settings)
        self.index, self._make_shard = index, make_shard

    def shard(self, number: int) -> ShardFile:
        """A new reader of the shard with this number in the set."""
        raw, zipped = self.index.raw[number], self.index.zipped[number]
        assert raw is not None
        kind = self.index.kinds[self.index.kind[number]]
        about: dict[str, Any] = {name: value for name, value in kind.items() if name not in ("version", "format")}
        about["raw_data"], about["zip_data"] = FileInfo(*raw, {}), FileInfo(*zipped, {}) if zipped else None
        return self._make_shard(MDSReader(self.local, self.split, samples=int(self.index.samples[number]), **about))

    def validate(self, allow_unsafe_types: bool) -> None:
        """Raises ValueError for shards that are not MDS, or hold what must be unpickled and that is not allowed."""
        for kind in self.index.kinds:
            whole = {"samples": 0, "raw_data": None, "zip_data": None, **kind}
            MDSReader.from_json(self.local, self.split, whole).validate(allow_unsafe_types)

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Any]:
        """The sizes of the set's shards. Raises ValueError as `validate` does."""
        self.validate(allow_unsafe_types)
        sizes = zip(self.index.samples.tolist(), (self.index.raw.sizes + self.index.zipped.sizes).tolist(), strict=True)
        return list(starmap(_ShardSize, sizes))

    def set_up_local(self, shards: Any, cache_usage_per_shard: np.ndarray) -> None:
        """Notes the bytes of each shard on this node's disk; without a cache all are there, as far as streaming is concerned."""
        if self.remote is None:
            cache_usage_per_shard[:] = self.index.raw.sizes
        else:
            readers: Any = map(self.shard, range(len(self.index)))  # one at a time, as all of them take gigabytes
            super().set_up_local(readers, cache_usage_per_shard)


@dataclass(frozen=True)
class SamplePlace:
    """The place of a sample: its stream, its shard among those of all streams, and its number in the shard."""

    stream: int
    shard: int
    index: int


class _Shared:
    """A whole number of a dataset, in memory that loader processes of earlier passes see, too."""

    def __init__(self, index: int):
        self.index = index

    def __get__(self, dataset: Any, owner: Any = None) -> int:
        return dataset.shared_numbers[self.index]

    def __set__(self, dataset: Any, value: int) -> None:
        dataset.shared_numbers[self.index] = value


class PositionedDataset(StreamingDataset):
    """A StreamingDataset whose passes start where they are told, and whose repeated samples can be told apart.

    Samples have numbers from 0 on through all shards of all streams. A sample that is drawn several times in an epoch has
    `num_samples` more in its number for each time before.

    Args:
        parts: gives each stream's part of an epoch, in the order of the streams; without it each epoch draws the samples that
            the streams `choose`.
        settings: streaming's own; the seed that is among them stays the one of the parts' passes.

    Attributes:
        epoch, first_sample: where the next pass starts; to be set before it, as is `shuffle_seed`.
    """

    epoch, first_sample, shuffle_seed = _Shared(0), _Shared(1), _Shared(2)
    shards: Sequence[ShardFile]  # type: ignore[assignment]

    def __init__(
        self, streams: Sequence[IndexedStream], parts: Callable[[int], list[Part]] | None = None, **settings: Any
    ):
        self.shared_numbers = RawArray("q", 3)
        super().__init__(streams=streams, **settings)
        self._parts, self._passes_seed, self._drawn = parts, self.shuffle_seed, dict[int, Part]()
        self.shards = _Shards(streams, self.stream_per_shard, self.shard_offset_per_stream)
        self.spanner = _RepeatedSpanner(self.spanner, self.num_samples)  # type: ignore[assignment]

    def _resume(self, world: Any, epoch: int) -> tuple[int, int]:
        """Returns where a pass starts. streaming reads it from shared memory, and starts at 0 where that was removed."""
        return self.epoch, self.first_sample

    def _get_work(self, epoch: int, sample_in_epoch: int) -> Any:
        """Returns this worker's samples of an epoch. With `parts`, streaming sees the streams of which it draws some alone."""
        if self._parts is None:
            return super()._get_work(epoch, sample_in_epoch)
        self._drawn = {stream: part for stream, part in enumerate(self._parts(epoch)) if part.count}
        self.epoch_size = sum(part.count for part in self._drawn.values())
        every = self.streams
        for stream, part in self._drawn.items():
            every[stream].proportion = part.count / self.epoch_size
        self.streams = [every[stream] for stream in self._drawn]
        try:
            return super()._get_work(epoch, sample_in_epoch)
        finally:
            self.streams = every

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[Any, Any]:
        """Draws an epoch's samples, each repeat with a number of its own."""
        if self._parts is None:
            units, numbers = super().resample_streams(epoch, stream_id)
            repeats = any(stream.repeat > 1 for stream in self.streams)
        else:
            among = list(self._drawn)
            drawn = [self._draw(stream) for stream in (among if stream_id is None else [among[stream_id]])]
            units, numbers = (np.concatenate(arrays) for arrays in zip(*drawn, strict=True))
            repeats = True
        if repeats:
            numbers = numbers + self.num_samples * times_before(numbers)
        return units, numbers

    def _draw(self, stream: int) -> tuple[np.ndarray, np.ndarray]:
        """A stream's part of the epoch, with the numbers that its samples have among those of all streams."""
        shards = self.shards_of(stream)
        samples, offset = self.samples_per_shard[list(shards)], self.sample_offset_per_shard[shards.start]
        units, numbers = draw(samples, self._drawn[stream], self.sampling_granularity, [self._passes_seed, stream])
        return units, numbers + offset

    def place_of(self, number: int) -> SamplePlace:
        """The place of the sample with this number."""
        shard, index = self.spanner[number]
        return SamplePlace(int(self.stream_per_shard[shard]), int(shard), int(index))

    def shards_of(self, stream: int) -> range:
        """The shards of a stream."""
        first = int(self.shard_offset_per_stream[stream])
        return range(first, first + int(self.shards_per_stream[stream]))

    def number_of(self, shard: int, index: int) -> int:
        """The number of a shard's sample; after its last sample the first one follows."""
        return int(self.sample_offset_per_shard[shard] + index % self.samples_per_shard[shard])


class _Shards(Sequence[ShardFile]):
    """The readers of all streams' shards, each made when it is first asked for, and kept."""

    def __init__(self, streams: Sequence[IndexedStream], stream_per_shard: np.ndarray, first_of_stream: np.ndarray):
        self._streams, self._stream_per_shard, self._first_of_stream = streams, stream_per_shard, first_of_stream
        self._made: dict[int, ShardFile] = {}

    def __len__(self) -> int:
        return len(self._stream_per_shard)

    def __getitem__(self, shard: Any) -> Any:
        made = self._made.get(shard)
        if made is None:
            stream = self._stream_per_shard[shard]
            new = self._streams[stream].shard(int(shard - self._first_of_stream[stream]))
            made = self._made.setdefault(shard, new)  # another thread may have made it, too
        return made


@dataclass(frozen=True)
class _RepeatedSpanner:
    """streaming's table of (shard, number in it) by a sample's number, also for the numbers of repeats."""

    spanner: Any
    size: int

    def __getitem__(self, number: int) -> tuple[int, int]:
        return self.spanner[number % self.size]


def times_before(numbers: np.ndarray) -> np.ndarray:
    """Counts how many times each number [n] stands in the list before it, [n]."""
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    before = np.empty_like(numbers)
    before[order] = np.arange(len(numbers)) - np.repeat(starts, np.diff(starts, append=len(numbers)))
    return before
