"""Location of a data set: a folder, or a URL or folder with a cache on this node's own disk.

`read_indexes` makes it ready: indexes are read once, by process 0; a cache gets them on each node, and is rid of what is stale.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from data_prep import schema
from data_prep.common.files import lock, temporary_name
from data_prep.common.storage import Remote, is_remote
from pretrain.config import DataSection
from pretrain.data.shard_index import ShardIndex
from pretrain.distributed.world import World, broadcast, once, once_per_node

LOCK = "in-use"  # a file in the cache that its training keeps locked


@dataclass(frozen=True)
class DataLocation:
    """The location of a data set.

    Attributes:
        origin: the data set's folder or URL.
        root: the folder with its small files: the data set itself, or its own folder in the cache.
        cached: whether shards are copied or decompressed into `root` before they are read.
    """

    origin: str
    root: Path
    cached: bool

    @classmethod
    def of(cls, data: DataSection) -> DataLocation:
        """The location that the config names. Each data set has its own folder in the cache, named after its origin."""
        remote = is_remote(data.path)
        origin = data.path.rstrip("/") if remote else str(Path(data.path).resolve())
        if data.cache is None:
            return cls(origin, Path(data.path), cached=False)
        if remote and "S3_ENDPOINT_URL" in os.environ:  # which streaming reads, but not the library that lists here
            os.environ.setdefault("AWS_ENDPOINT_URL", os.environ["S3_ENDPOINT_URL"])
        digest = hashlib.sha256(origin.encode()).hexdigest()[:8]
        return cls(origin, data.cache / f"{origin.rpartition('/')[2]}-{digest}", cached=True)

    def lock_cache(self) -> IO[str] | None:
        """Keeps other trainings out of the cache while the returned file is open. Raises ValueError where one is in it."""
        if not self.cached:
            return None
        self.root.mkdir(parents=True, exist_ok=True)
        file = (self.root / LOCK).open("w")
        try:
            lock(file)
        except BlockingIOError as error:
            raise ValueError(
                f"data.cache: {self.root} is in use by another training on this node; give this one another folder"
            ) from error
        return file

    def fetch(self, name: str) -> Path:
        """Fetches a small file of the data set beside its place in the cache; returns its path there, to be renamed."""
        path = self.root / name
        new = path.with_name(temporary_name(path.name))
        if not Remote(self.origin).download(name, new):
            raise FileNotFoundError(
                f"{self.origin} is no data set: {name} is missing; make one with data_prep/encode.py"
            )
        return new


def open_card(location: DataLocation, world: World) -> schema.Card:
    """Reads the data set's card; with a cache it and the null text are fetched first, once per node.

    Raises:
        ValueError, OSError: there is no data set, or its shards are compressed and there is no cache to unpack them in.
    """

    def fetch() -> None:
        for name in (schema.CARD, schema.NULL_TEXT):
            location.fetch(name).replace(location.root / name)

    if location.cached:
        once_per_node(fetch, world)
    card = schema.Card.load(location.root)
    if card.choices.get("compression") and not location.cached:
        raise ValueError(
            f"data.cache: the shards of {location.origin} are compressed; give a folder on each node's own disk to unpack them in"
        )
    return card


def read_indexes(location: DataLocation, sets: Iterable[str], world: World) -> dict[str, ShardIndex]:
    """Reads the sets' indexes: in process 0, for all. A cache gets them first, and is rid of what is stale, once per node.

    Args:
        sets: the folders of the sets within the data set.

    Raises:
        ValueError: on all processes: an index is missing or damaged.
    """

    if location.cached:
        read = once_per_node(lambda: {name: _refresh(location, name) for name in sets}, world)
        return cast(dict[str, ShardIndex], broadcast(read, world))
    return once(lambda: {name: ShardIndex.read(location.root / name / schema.INDEX) for name in sets}, world)


def _refresh(location: DataLocation, name: str) -> ShardIndex:
    """Fetches a set's index, and removes shards from the cache that are of an earlier index or cut off."""
    path = location.root / name / schema.INDEX
    new = location.fetch(f"{name}/{schema.INDEX}")
    index = ShardIndex.read(new)
    sizes = dict(file for files in (index.raw, index.zipped) for file in files if file is not None)
    if not path.is_file():
        stale = {*sizes}
    elif filecmp.cmp(path, new, shallow=False):
        stale = set()
    else:
        stale = _differing(path, new)
    for basename in sizes.keys() | stale:
        if basename in stale or file_size(f"{path.parent}/{basename}") != sizes[basename]:
            (path.parent / basename).unlink(missing_ok=True)
    new.replace(path)
    return index


def _differing(old: Path, new: Path) -> set[str]:
    """The files that one of two indexes names only, or with other bytes or hashes."""
    ShardIndex.read(old)  # refuses names outside of its folder
    before, now = (
        {
            about["basename"]: about
            for shard in json.loads(path.read_bytes())["shards"]
            for about in (shard["raw_data"], shard["zip_data"])
            if about is not None
        }
        for path in (old, new)
    )
    return {basename for basename in before.keys() | now.keys() if before.get(basename) != now.get(basename)}


def file_size(path: str) -> int | None:
    """The bytes of a file; None where there is none."""
    try:
        about = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return about.st_size if stat.S_ISREG(about.st_mode) else None
