"""Damages of a data set, each one line, and its files in a folder or on object storage."""

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
MALFORMED = (AttributeError, KeyError, TypeError, ValueError)  # raised by reading JSON of another structure


class DamagedFile(Exception):
    """Raised where a file is damaged, with the problem."""

    def __init__(self, file: str, problem: str):
        super().__init__(file, problem)
        self.file, self.problem = file, problem

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


@dataclass(frozen=True)
class Damage:
    """Damage of a file. A repair makes `part` again; without one, it writes a file that is made from all parts."""

    file: str
    problem: str
    part: str | None = None

    def __str__(self) -> str:
        mend = f"makes {self.part} again" if self.part else "writes it again"
        return f"{self.file}: {self.problem}; --repair {mend}"


@contextmanager
def collect_damage(damages: list[Damage], part: str | None = None) -> Iterator[None]:
    """Context of a check: adds a `DamagedFile` that it raises to `damages`."""
    try:
        yield
    except DamagedFile as error:
        damages.append(Damage(error.file, error.problem, part))


class Files:
    """Files of a data set: in a folder, or on object storage and downloaded to `temporary` when they are read."""

    def __init__(self, data: str, temporary: Path):
        self.data = data
        self.remote = Remote(data) if is_remote(data) else None
        self.root = temporary if self.remote else Path(data)
        self.sizes: dict[str, int] = {}

    def list_files(self) -> None:
        """Lists the files with their sizes in bytes in `sizes`, without those in work/."""
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
        """Returns the parts that have a report, sorted."""
        found = [name.split("/") for name in self.sizes if name.endswith(".json")]
        return sorted(f"{n[1]}/{n[2].removesuffix('.json')}" for n in found if len(n) == 3 and n[0] == schema.REPORTS)

    def read(self, name: str, keep: bool = True) -> bytes:
        """Reads a file; with `keep` the copy of a remote one stays at `root`. Raises DamagedFile or Unreachable."""
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
        """Reads a file of UTF-8 text. Raises as `read`."""
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            raise DamagedFile(name, "is no UTF-8") from error

    def json(self, name: str) -> Any:
        """Reads a file of JSON. Raises as `read`."""
        try:
            return json.loads(self.text(name))
        except ValueError as error:
            raise DamagedFile(name, f"is no JSON ({error})") from error


def difference(found: Any, expected: Any, path: str = "") -> str | None:
    """Describes the first place where two JSON values differ; None where they are equal."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *(k for k in found if k not in expected)]:
            if words := difference(found.get(key), expected.get(key), f"{path}.{key}".lstrip(".")):
                return words
        return None
    return None if found == expected else f"{path} is {_short(found)}, the parts give {_short(expected)}"


def _short(value: Any) -> str:
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 60 else f"{words[:57]}…"
