"""Location of a data set: a folder, or a URL or folder with a cache on this node's own disk.

`prepare` makes it ready once per node: indexes are fetched, the cache is rid of what is stale, missing and cut shards are named.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_prep import schema
from data_prep.common.files import lock, temporary_name
from data_prep.common.storage import Remote, is_remote
from pretrain.config import DataSection
from pretrain.distributed.world import World, once_per_node

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


def prepare(location: DataLocation, sets: Iterable[str], budget: int, world: World) -> list[str]:
    """Makes the sets ready to be read: once per node, while the other processes wait.

    Args:
        sets: the folders of the sets within the data set.
        budget: the number of shards that may be missing or cut.

    Returns:
        In the first process of a node a line for each shard that is missing or cut; nothing in the others.

    Raises:
        ValueError: on all processes: more shards are missing or cut than the budget allows, or an index is damaged.
    """

    def action() -> list[str]:
        for name in sets:
            if location.cached:
                _refresh(location, name)
        return check_shards(location, sets, budget)

    return once_per_node(action, world) or []


def _refresh(location: DataLocation, name: str) -> None:
    """Fetches a set's index, and removes shards from the cache that are of an earlier index or cut off."""
    path = location.root / name / schema.INDEX
    new = location.fetch(f"{name}/{schema.INDEX}")
    before = _files(path) if path.is_file() else {}
    now = _files(new)
    for basename in before.keys() | now.keys():
        shard, about = path.parent / basename, now.get(basename)
        good = about is not None and before.get(basename) == about and _size(shard) == about["bytes"]
        if not good:
            shard.unlink(missing_ok=True)
    new.replace(path)


def _files(index: Path) -> dict[str, dict[str, Any]]:
    """Each file that an index names, with its bytes and hashes: the shards as they are read, and as they are stored."""
    return {about["basename"]: about for shard in _shards(index) for about in shard if about is not None}


def _shards(index: Path) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each shard's raw and, if compressed, stored file. Raises ValueError for an index that is damaged or reaches out."""
    try:
        found = [(shard["raw_data"], shard["zip_data"]) for shard in json.loads(index.read_text())["shards"]]
        names = [Path(about["basename"]) for pair in found for about in pair if about is not None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged ({error!r}); encode the data set again") from error
    if any(name.is_absolute() or ".." in name.parts for name in names):
        raise ValueError(f"{index} names files outside of its folder: it was not made by data_prep/encode.py")
    return found


def check_shards(location: DataLocation, sets: Iterable[str], budget: int) -> list[str]:
    """Lists the shards that are missing or cut, a line each. Raises ValueError where there are more than the budget."""
    bad = []
    for name in sets:
        recorded = [stored or raw for raw, stored in _shards(location.root / name / schema.INDEX)]
        sizes = _sizes(location.origin, name, [about["basename"] for about in recorded])
        bad += [
            f"{location.origin}/{name}/{about['basename']}: "
            f"{'missing' if size is None else f'{size} bytes'}, expected {about['bytes']} bytes"
            for about in recorded
            if (size := sizes.get(about["basename"])) != about["bytes"]
        ]
    if len(bad) > budget:
        lines = "".join(f"\n  {line}" for line in bad[:10])
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(
            f"{location.origin}: {len(bad)} shards are missing or cut, data.damaged_shards allows {budget}; "
            f"data_prep/verify.py --repair makes them again:{lines}{more}"
        )
    return [f"data: {line}; other samples stand in for its own" for line in bad]


def _sizes(origin: str, name: str, basenames: list[str]) -> dict[str, int]:
    """The sizes in bytes of a set's files, by name; files that are not there are left out."""
    if is_remote(origin):
        return {path.removeprefix(f"{name}/"): size for path, size in Remote(origin).sizes(name).items()}
    sizes = {basename: _size(Path(origin, name, basename)) for basename in basenames}
    return {basename: size for basename, size in sizes.items() if size is not None}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
