"""What verify.py finds: damages, each of them one line, in the files of a folder or of object storage."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import schema
from data_prep.common.storage import Remote, is_remote

Json = dict[str, Any]
MALFORMED = (AttributeError, KeyError, TypeError, ValueError)  # what reading JSON of another structure raises


class DamagedFile(Exception):
    """A file that is not as it should be, and in what."""

    def __init__(self, file: str, what: str):
        super().__init__(file, what)
        self.file, self.what = file, what

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class Damage:
    """One line of the result. `part` is to be made again; without one, it is a file that follows from all parts."""

    file: str
    what: str
    part: str | None = None

    def __str__(self) -> str:
        mend = f"makes {self.part} again" if self.part else "writes it again"
        return f"{self.file}: {self.what}; --repair {mend}"


@contextmanager
def collect_damage(damages: list[Damage], part: str | None = None) -> Iterator[None]:
    """Around one check: what is wrong becomes a line."""
    try:
        yield
    except DamagedFile as wrong:
        damages.append(Damage(wrong.file, wrong.what, part))


class Files:
    """The files of a data set: of a folder, or of object storage, fetched to `temporary` when they are asked for."""

    def __init__(self, data: str, temporary: Path):
        self.data = data
        self.remote = Remote(data) if is_remote(data) else None
        self.root = temporary if self.remote else Path(data)
        self.sizes: dict[str, int] = {}

    def list_files(self) -> None:
        """Lists anew what there is, but for what is under way in work/."""
        if self.remote is not None:
            found = self.remote.sizes("")
            self.sizes = {n: size for n, size in found.items() if not n.startswith(f"{schema.WORK}/")}
            return
        self.sizes = {}
        for at, folders, names in os.walk(self.root, followlinks=True):
            if Path(at) == self.root and schema.WORK in folders:
                folders.remove(schema.WORK)
            for path in (Path(at, name) for name in names):
                self.sizes[path.relative_to(self.root).as_posix()] = path.stat().st_size if path.exists() else 0

    def parts(self) -> list[str]:
        """The parts that have a report, in order."""
        found = [name.split("/") for name in self.sizes if name.endswith(".json")]
        return sorted(f"{n[1]}/{n[2].removesuffix('.json')}" for n in found if len(n) == 3 and n[0] == schema.REPORTS)

    def read(self, name: str, keep: bool = True) -> bytes:
        """A file's content; of a remote one a copy stays at `root`, if that is wanted. Raises DamagedFile, or Unreachable."""
        if name not in self.sizes:
            raise DamagedFile(name, "is missing")
        path = self.root / name
        if self.remote is not None and not self.remote.download(name, path):
            raise DamagedFile(name, "is missing")
        try:
            return path.read_bytes()
        except OSError as error:
            raise DamagedFile(name, f"cannot be read ({error.strerror})") from error
        finally:
            if self.remote is not None and not keep:
                path.unlink()

    def text(self, name: str) -> str:
        """As `read`, for UTF-8."""
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            raise DamagedFile(name, "is no UTF-8") from error

    def json(self, name: str) -> Any:
        """As `read`, for JSON."""
        try:
            return json.loads(self.text(name))
        except ValueError as error:
            raise DamagedFile(name, f"is no JSON ({error})") from error


def difference(there: Any, expected: Any, place: str = "") -> str | None:
    """The first place where two JSON values differ, in words."""
    if isinstance(there, dict) and isinstance(expected, dict):
        for key in [*expected, *(k for k in there if k not in expected)]:
            if found := difference(there.get(key), expected.get(key), f"{place}.{key}".lstrip(".")):
                return found
        return None
    return None if there == expected else f"{place} is {_short(there)}, the parts give {_short(expected)}"


def _short(value: Any) -> str:
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 60 else f"{words[:57]}…"
