"""Check of a data set's shard files at the start: all there, none cut, each looked at once by one process of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep import schema
from data_prep.common.progress import LOG_SECONDS, Progress
from data_prep.common.storage import Remote, is_remote
from data_prep.common.words import counted
from pretrain.data.location import DataLocation, file_size
from pretrain.data.shard_index import ShardIndex
from pretrain.distributed.world import World, in_each

CHUNK = 500  # shards between two looks at the clock


def check_shards(location: DataLocation, indexes: dict[str, ShardIndex], budget: int, world: World) -> list[str]:
    """Lists the shards that are missing or cut, a line each, alike on all processes.

    Processes that see the same folder divide its shards among them. Where nodes have folders of their own in the data set's
    place, each node looks at all of its own.

    Args:
        indexes: the sets, by their folders within the data set.
        budget: the number of shards that may be missing or cut.

    Raises:
        ValueError: on all processes: there are more.
    """
    part = _part(location, sum(map(len, indexes.values())), world)
    found = in_each(lambda: _wrong_sizes(location, indexes, part, shown=world.rank == 0), world)
    bad = np.unique(np.concatenate(found), axis=0)
    lines = [_line(location, indexes, number, size) for number, size in bad[: max(budget, 10)].tolist()]
    if len(bad) > budget:
        listed = "".join(f"\n  {line}" for line in lines[:10])
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(
            f"{location.origin}: {counted(len(bad), 'shard')} missing or cut, data.damaged_shards allows {budget}; "
            f"data_prep/verify.py --repair makes them again:{listed}{more}"
        )
    return [f"data: {line}; other samples stand in for its own" for line in lines]


def _part(location: DataLocation, total: int, world: World) -> range:
    """This process's part of the numbers of all shards; object storage is listed by process 0."""
    if is_remote(location.origin):
        return range(total if world.rank == 0 else 0)
    folders = in_each(lambda: _identity(Path(location.origin, schema.CARD)), world)
    sharers = [rank for rank, folder in enumerate(folders) if folder == folders[world.rank]]
    place, count = sharers.index(world.rank), len(sharers)
    return range(total * place // count, total * (place + 1) // count)


def _identity(path: Path) -> tuple[int, int, int]:
    """What processes find alike that see the same file: its number, the time of its last change, and its bytes."""
    about = os.stat(path)
    return about.st_ino, about.st_ctime_ns, about.st_size


def _wrong_sizes(location: DataLocation, indexes: dict[str, ShardIndex], part: range, shown: bool) -> np.ndarray:
    """Looks at shards by their numbers.

    Returns:
        A row [2] for each whose size is not its index's: its number and its size, -1 where it is missing.
    """
    wrong: list[tuple[int, int]] = []
    first = 0
    progress = Progress(len(part), "shard", line_seconds=LOG_SECONDS, delay=LOG_SECONDS) if shown else None
    for name, index in indexes.items():
        numbers = range(max(part.start, first), min(part.stop, first + len(index)))
        files = [index.stored(number - first) for number in numbers]
        sizes = _sizes(location.origin, name, [basename for basename, _ in files], progress)
        wrong += [
            (number, -1 if size is None else size)
            for number, (_, expected), size in zip(numbers, files, sizes, strict=True)
            if size != expected
        ]
        first += len(index)
    if progress is not None:
        progress.close()
    return np.array(wrong, np.int64).reshape(-1, 2)


def _sizes(origin: str, name: str, basenames: list[str], progress: Progress | None) -> Iterator[int | None]:
    """The sizes in bytes of a set's files, in order; None for those that are not there."""
    if is_remote(origin):
        there = Remote(origin).sizes(name) if basenames else {}
        yield from (there.get(f"{name}/{basename}") for basename in basenames)
        return
    for number, basename in enumerate(basenames, 1):
        yield file_size(f"{origin}/{name}/{basename}")
        if progress is not None and (number % CHUNK == 0 or number == len(basenames)):
            progress.update(number % CHUNK or CHUNK)


def _line(location: DataLocation, indexes: dict[str, ShardIndex], number: int, size: int) -> str:
    for name, index in indexes.items():
        if number < len(index):
            basename, expected = index.stored(number)
            found = "missing" if size < 0 else f"{size} bytes"
            return f"{location.origin}/{name}/{basename}: {found}, expected {expected} bytes"
        number -= len(index)
    raise AssertionError(number)
