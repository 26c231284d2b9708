"""Commands that made a data set's parts, kept in its work/encode/ so that `verify.py --repair` can run them again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.schema import WORK, write_file

FOLDER = f"{WORK}/encode"


@dataclass(frozen=True)
class SavedCommand:
    """A run of encode.py: the folder that it ran in, its options but for --output and --work, and its --output."""

    file: Path
    directory: str
    arguments: list[str]
    output: str

    @classmethod
    def load_all(cls, root: Path) -> list[SavedCommand]:
        """Reads the commands kept in a data set's folder, by name. Raises ValueError where one is damaged."""
        found = []
        for file in sorted((root / FOLDER).glob("*.json")):
            try:
                found.append(cls(file, **json.loads(file.read_text(encoding="utf-8"))))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file} is damaged ({error}); remove it, and run encode.py again by hand") from error
        return found

    @contextlib.contextmanager
    def in_directory(self) -> Iterator[None]:
        """Changes to the folder that the command ran in, and back. Raises ValueError where it is gone."""
        if not Path(self.directory).is_dir():
            raise ValueError(f"{self.directory}, where encode.py ran ({self.file}), is gone; run it again by hand")
        before = os.getcwd()
        os.chdir(self.directory)
        try:
            yield
        finally:
            os.chdir(before)


def save_command(root: Path, arguments: list[str], output: str) -> None:
    """Keeps a command that is run in the current folder; one file for each command that differs."""
    command = {"directory": os.getcwd(), "arguments": arguments}
    name = hashlib.sha256(json.dumps(command).encode()).hexdigest()[:16]
    write_file(root, f"{FOLDER}/{name}.json", json.dumps({"output": output, **command}, indent=1) + "\n")
