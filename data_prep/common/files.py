"""Files that are either absent, old, or whole."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


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
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
