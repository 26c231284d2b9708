"""Names in /dev/shm that no other training on this node has.

streaming names its shared memory and its lock files NUMBER_what, with the first number that is free. A killed run's number is
free again while its resource tracker may still be about to unlink files of that number, and two runs that start together may
find the same one. So each start draws a number of its own out of a billion.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pretrain.distributed.world import World, broadcast

# Above what other programs count up to; with 9 digits the longest name fits into macOS's 31 characters.
FIRST, LAST = 10**6, 10**9 - 1
NAME = re.compile(r"(\d{6,9})_\w+")
AGE = 60.0  # seconds; a process may just have made a younger name, and not have mapped it yet


@contextlib.contextmanager
def unique_names(world: World) -> Iterator[None]:
    """Lets a StreamingDataset, within it, take a number that all processes of this start agree on, and no other start has."""
    from pretrain.data.streaming_private import (
        shared_memory_number,  # late: a check on the login node needs no streaming
    )

    with shared_memory_number(broadcast(FIRST + secrets.randbelow(LAST - FIRST), world)):
        yield


def remove_stale_names(memory: Path = Path("/dev/shm"), locks: Path | None = None) -> int:
    """Removes this user's files that killed runs of streaming left, and none that a living process still uses.

    streaming's own clean-up would remove those of other runs on this node, too.

    Args:
        memory: the folder of shared memory.
        locks: the folder of lock files; by default the one where streaming keeps them.

    Returns:
        The bytes of memory that were freed.
    """
    left, mapped = _numbers(memory), _mapped(memory)
    removed = 0
    for path in left:
        if str(path) not in mapped:
            with contextlib.suppress(FileNotFoundError):
                removed += path.stat().st_size
                path.unlink()
    living = {left[path] for path in left if path.exists()}
    for path, number in _numbers(locks or Path(tempfile.gettempdir())).items():
        if number in living or not path.name.endswith("_filelock"):
            continue
        with contextlib.suppress(OSError), path.open() as file:  # it is gone, or locked
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # who waits for it looks whether it is still there
            path.unlink()
    return removed


def _numbers(folder: Path) -> dict[Path, str]:
    """This user's files of such names that are older than AGE, with their numbers."""
    found = {}
    for path in folder.glob("[0-9]*_*"):
        match = NAME.fullmatch(path.name)
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            if match and stat.st_uid == os.getuid() and time.time() - stat.st_mtime > AGE:
                found[path] = match[1]
    return found


def _mapped(folder: Path) -> set[str]:
    """The files of a folder that any process of this user maps."""
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process ended, or belongs to somebody else
            mapped |= {line.split(None, 5)[-1].strip() for line in maps.read_text().splitlines() if str(folder) in line}
    return mapped
