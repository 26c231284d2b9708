"""Index of a set in memory: names, sizes and samples of its shards in arrays, some 50 bytes a shard.

100 million samples are 730,000 shards, whose entries in `index.json` are 400 MB of text. One process of a run parses and hashes
it, and hands the arrays to the others.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 2  # of MDS


@dataclass(frozen=True)
class Files:
    """A file for each shard: names within the set's folder [n] as bytes, and sizes [n] in bytes; no name where there is none."""

    names: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, abouts: list[dict[str, Any] | None]) -> Files:
        """The files that an index describes so."""
        names = [b"" if about is None else about["basename"].encode() for about in abouts]
        return cls(np.array(names), np.array([0 if about is None else about["bytes"] for about in abouts], np.int64))

    def __iter__(self) -> Iterator[tuple[str, int] | None]:
        return map(self.__getitem__, range(len(self.names)))

    def __getitem__(self, shard: int) -> tuple[str, int] | None:
        """The name and size of a shard's file; None where there is none."""
        name = self.names[shard]
        return (name.decode(), int(self.sizes[shard])) if name else None

    def select(self, shards: np.ndarray) -> Files:
        """The files of the shards with these numbers [m]."""
        return Files(self.names[shards], self.sizes[shards])


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a set, in order.

    Attributes:
        sha256: of the index's file, with the shards that are not selected.
        samples: the number of samples of each shard [n].
        raw: the shards as they are read.
        zipped: the files that they are decompressed from.
        kinds: the rest of the shards' entries: columns and compression, each kind once.
        kind: the number of each shard's kind [n].
    """

    sha256: str
    samples: np.ndarray
    raw: Files
    zipped: Files
    kinds: tuple[dict[str, Any], ...]
    kind: np.ndarray

    @classmethod
    def read(cls, path: Path) -> ShardIndex:
        """Reads a set's index. Raises ValueError where it is damaged or names files outside of its folder."""
        try:
            content = path.read_bytes()
            with _without_collection():
                index = cls._of(hashlib.sha256(content).hexdigest(), json.loads(content))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); encode the data set again") from error
        if any(_reaches_out(name) for files in (index.raw, index.zipped) for name in files.names.tolist()):
            raise ValueError(f"{path} names files outside of its folder: it was not made by data_prep/encode.py")
        return index

    @classmethod
    def _of(cls, sha256: str, content: dict[str, Any]) -> ShardIndex:
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, not {VERSION}")
        entries = content["shards"]
        samples = np.array([entry.pop("samples") for entry in entries], np.int64)
        raw, zipped = (Files.of([entry.pop(name) for entry in entries]) for name in ("raw_data", "zip_data"))
        if (nameless := np.flatnonzero(raw.names == b"")).size:
            raise ValueError(f"raw_data of shard {nameless[0]} names no file")
        kinds: list[dict[str, Any]] = []
        kind = np.zeros(len(entries), np.int32)
        number = 0
        for i, rest in enumerate(entries):
            if i == 0 or rest != entries[i - 1]:
                if rest not in kinds:
                    kinds.append(rest)
                number = kinds.index(rest)
            kind[i] = number
        return cls(sha256, samples, raw, zipped, tuple(kinds), kind)

    def __len__(self) -> int:
        return len(self.samples)

    def file_names(self) -> list[str]:
        """The names of the shards as they are read, within the set's folder."""
        return [name.decode() for name in self.raw.names.tolist()]

    def select(self, keep: list[bool]) -> ShardIndex:
        """The shards [n] that are to be kept, in order."""
        kept = np.flatnonzero(keep)
        raw, zipped = self.raw.select(kept), self.zipped.select(kept)
        return ShardIndex(self.sha256, self.samples[kept], raw, zipped, self.kinds, self.kind[kept])

    def stored(self, shard: int) -> tuple[str, int]:
        """The name and size of a shard's file in the data set: what it is decompressed from, or the shard itself."""
        about = self.zipped[shard] or self.raw[shard]
        assert about is not None
        return about


def _reaches_out(name: bytes) -> bool:
    return name.startswith(b"/") or (b".." in name and b".." in name.split(b"/"))


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keeps Python from looking for garbage in millions of new objects again and again: eight times as fast."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
