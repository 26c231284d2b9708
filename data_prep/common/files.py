"""Files that are either absent, old, or whole, on file systems that lack one or another function, too."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
from pathlib import Path
from typing import IO

# Errors by which a file system says that it has no such function; others, such as EIO, are failures.
LACKING = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY, errno.ENOLCK}


def temporary_name(name: str) -> str:
    """Returns a name for a temporary file, which no other writer on any node uses."""
    return f".tmp-{name}-{secrets.token_hex(4)}"


def atomic_write(path: Path, content: str | bytes, temporary_folder: Path | None = None) -> None:
    """Writes a small file so that it is either absent, old, or whole; text in UTF-8. A failure leaves nothing behind.

    A writer that is killed may leave its temporary file: beside `path`, or in the folder `temporary_folder`, which must be
    on the same file system.
    """
    temporary = (temporary_folder or path.parent) / temporary_name(path.name)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            sync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(descriptor: int) -> None:
    """Writes a file or folder through to the disk, as far as its file system can (folders: some network ones cannot)."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in LACKING:
            raise


def sync_path(path: Path) -> None:
    """Writes a file or folder through to the disk, as `sync` does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def permit_as_umask(path: Path) -> None:
    """Gives a file that a library made for its owner alone the permissions of any new file of its folder."""
    probe = path.with_name(temporary_name(path.name))
    probe.touch()
    try:
        path.chmod(probe.stat().st_mode & 0o777)
    except PermissionError:  # a file system without permissions
        pass
    finally:
        probe.unlink()


def lock(file: IO[str]) -> bool:
    """Locks an open file for this process, until it is closed or the process ends.

    Returns:
        False where its file system has no locks.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError as error:  # as some systems say BlockingIOError
        raise BlockingIOError(*error.args) from error
    except OSError as error:
        if error.errno not in LACKING:
            raise
        return False
    return True


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
