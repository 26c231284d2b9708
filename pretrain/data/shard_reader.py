"""One sample from its shard, or why it cannot be read.

To streaming, a shard that cannot be fetched is the end of an epoch (in one process) or something to wait for (in several).
Here it counts as fetched: nothing waits for it, and reading its samples raises why it is not there.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from streaming.base.format import Reader

from data_prep.common import mds
from pretrain.data.held_out import ShardName
from pretrain.data.location import DataLocation
from pretrain.data.shard_index import ShardIndex
from pretrain.data.streaming_private import IndexedStream, ShardFile


@dataclass(frozen=True)
class UnreadableSample:
    """A sample that could not be read: its shard as SET/FILE within the data set, its number in it, and the reason."""

    shard: str
    sample: int
    reason: str


class Shard(ShardFile):
    """streaming's reader of a shard, with one copy of a sample's bytes in place of three, into memory that may be written.

    Attributes:
        lost: why the shard's file could not be fetched; None where it could, or was not yet asked for.

    Raises:
        ValueError, OSError: in reading a sample that is damaged or lost.
    """

    def __init__(self, reader: Reader):
        super().__init__(reader)
        self.lost: str | None = None

    def get_sample_data(self, idx: int) -> memoryview:  # type: ignore[override]
        """A sample's bytes as they are stored. FileNotFoundError has streaming fetch the shard and ask again."""
        try:
            return self._bytes(idx)
        except FileNotFoundError:
            if self.lost is None:
                raise
            raise ValueError(self.lost) from None

    def _bytes(self, idx: int) -> memoryview:
        with open(self.path, "rb", 0) as file:
            place = os.pread(file.fileno(), 8, 4 + 4 * idx)
            begin, end = struct.unpack("<2I", place) if len(place) == 8 else (0, 0)
            if not 0 < begin < end <= self.path_bytes:
                raise ValueError(f"its place is said to be bytes {begin} to {end} of {self.path_bytes}")
            data = np.empty(end - begin, np.uint8).data
            file.seek(begin)
            if file.readinto(data) != len(data):
                raise ValueError(f"its shard is cut off before byte {end}")
        return data

    def decode_sample(self, data: memoryview) -> dict[str, Any]:  # type: ignore[override]
        """A sample's columns, its checksum compared."""
        return mds.decode_sample(self, data)


class SetStream(IndexedStream):
    """Shards of one set, read at the data set's location; `choose` samples of them are drawn an epoch.

    A shard that cannot be fetched is `lost`; this process does not try it again.
    """

    def __init__(self, location: DataLocation, name: str, index: ShardIndex, choose: int):
        remote = f"{location.origin}/{name}" if location.cached else None
        super().__init__(index, Shard, local=f"{location.root}/{name}", remote=remote, choose=choose)
        self.name = name

    def open(self) -> dict[ShardName, ShardFile]:
        """All its shards, fetched, for use without a data set of streaming's."""
        self.apply_default(
            {"split": None, "download_retry": 2, "download_timeout": 60, "validate_hash": None, "keep_zip": False}
        )
        self.validate(allow_unsafe_types=False)
        shards = {ShardName(self.name, file): self.shard(i) for i, file in enumerate(self.index.file_names())}
        for shard in shards.values():
            self.prepare_shard(shard)
        return shards

    def prepare_shard(self, shard: Reader) -> int:
        """Fetches and unpacks a shard; returns by how many bytes the cache grew."""
        assert isinstance(shard, Shard)
        if self.remote is None:
            shard.lost = "its shard is missing"
        if shard.lost is not None:
            return 0
        try:
            return super().prepare_shard(shard)
        except Exception as error:  # each way of fetching and each method of compression raises its own kind
            shard.lost = f"its shard cannot be fetched ({type(error).__name__}: {error})"
            return 0
