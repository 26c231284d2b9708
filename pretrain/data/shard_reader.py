"""One sample from its shard, or what is wrong with it.

To streaming, a shard that cannot be had is the end of an epoch (in one process) or something to wait for (in several). Here it
counts as fetched: nothing waits for it, and reading its samples raises why it is not there.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from streaming import Stream
from streaming.base.format import Reader
from streaming.base.format.mds.reader import MDSReader

from data_prep.common import mds
from pretrain.data.location import DataLocation


@dataclass(frozen=True)
class Damage:
    """A sample that could not be read: its shard as SET/FILE within the data set, its number in it, and why not."""

    shard: str
    sample: int
    reason: str


class Shard(MDSReader):
    """streaming's reader of a shard, with one copy of a sample's bytes in place of three, into memory that may be written.

    Reading a sample raises ValueError or OSError where it is damaged. `lost` is why the shard's file could not be had.
    """

    def __init__(self, reader: Reader):
        vars(self).update(vars(reader))
        self.lost: str | None = None

    @property
    def stored(self) -> str:
        """The file that the data set holds: the shard, or what it is unpacked from."""
        return (self.zip_data or self.raw_data).basename

    def get_sample_data(self, idx: int) -> memoryview:  # type: ignore[override]
        try:
            return self._bytes(idx)
        except FileNotFoundError:
            if self.lost is None:
                raise  # streaming fetches it and asks again
            raise ValueError(self.lost) from None

    def _bytes(self, idx: int) -> memoryview:
        with open(os.path.join(self.dirname, self.split, self.raw_data.basename), "rb", 0) as file:
            place = os.pread(file.fileno(), 8, 4 + 4 * idx)
            begin, end = struct.unpack("<2I", place) if len(place) == 8 else (0, 0)
            if not 0 < begin < end <= self.raw_data.bytes:
                raise ValueError(f"its place is said to be bytes {begin} to {end} of {self.raw_data.bytes}")
            data = np.empty(end - begin, np.uint8).data
            file.seek(begin)
            if file.readinto(data) != len(data):
                raise ValueError(f"its shard is cut off before byte {end}")
        return data

    def decode_sample(self, data: memoryview) -> dict[str, Any]:  # type: ignore[override]
        return mds.decode_sample(self, data)


class SetStream(Stream):
    """The shards of one set, read at its place. What cannot be fetched is `lost`; this process does not try it again."""

    def __init__(self, place: DataLocation, name: str, choose: int):
        remote = f"{place.origin}/{name}" if place.cached else None
        super().__init__(local=f"{place.root}/{name}", remote=remote, choose=choose)
        self.name = name

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
