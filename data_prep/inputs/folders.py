"""Reader of plain folders: pictures with their captions beside them, `cat.jpg` with `cat.txt`, `cat.caption` or `cat.json`.

    PictureFolder.chunks  all pictures of a folder and of the folders in it, in chunks, each of which becomes a part
    read_folder           the samples of a chunk

The key is the path within the folder without the *last* extension (`a/cat.v2.jpg` is `a/cat.v2`); `cat.jpg.json` and
`cat.jpg.txt` belong to `cat.jpg`. Lists such as `metadata.jsonl`, as Hugging Face's image folders have them, in the folder of a
picture or above, give further fields by `file_name`. Hidden files and files of
other kinds belong to no sample. Pictures that come or go move others to other chunks: encode.py then names the parts to be made
again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from data_prep.inputs.captions import CaptionChoice
from data_prep.inputs.contents import TEXT_MEMBERS, Contents
from data_prep.inputs.parquet_files import read_rows
from data_prep.inputs.samples import IMAGE_EXTENSIONS, Members, Reject, Sample

CHUNK = 1000  # pictures of a part
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
# Pictures that are not supported: each is a reject, and not passed over.
_OTHER_PICTURES = ("gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl", "jp2", "jfif", "svg", "ico")
_PICTURES = {*IMAGE_EXTENSIONS, *_OTHER_PICTURES}
_EXTENSIONS = {*_PICTURES, "json", *(name[1:] for name in TEXT_MEMBERS)}


@dataclass(frozen=True)
class PictureFolder:
    """A folder of pictures."""

    path: Path

    def chunks(self, archives: tuple[str, ...]) -> tuple[list[str], list[tuple[str, ...]]]:
        """Returns the files with the endings `archives`, and the chunks of the samples' files; none without any picture."""
        others, files, visited = [], [], set()
        for folder, folders, names in os.walk(self.path, followlinks=True):
            if (inode := (os.stat(folder).st_dev, os.stat(folder).st_ino)) in visited:
                folders.clear()  # a link that leads back
                continue
            visited.add(inode)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = Path(folder).relative_to(self.path)
            for name in names:
                if name.lower().endswith(archives) and name not in METADATA:
                    others.append((inside / name).as_posix())
                elif not name.startswith(".") and _split(name)[1] in _EXTENSIONS:
                    files.append((inside / name).as_posix())
        if not any(_split(name)[1] in _PICTURES for name in files):
            return others, []
        groups = [list(group) for _, group in groupby(sorted(files, key=_split), key=lambda name: _split(name)[0])]
        return others, [tuple(chain(*groups[n : n + CHUNK])) for n in range(0, len(groups), CHUNK)]

    def stamp(self, files: Sequence[str]) -> tuple[int, str]:
        """Returns the size of all files, and a hash of their names, sizes and times. Raises FileNotFoundError."""
        digest, total = hashlib.sha256(), 0
        for name in (*files, *self._metadata_files(files)):
            about = _stat(self.path / name)
            total += about.st_size
            digest.update(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
        return total, digest.hexdigest()[:32]

    def metadata(self, files: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Returns the fields that lists give, by the pictures' names. Raises ValueError."""
        found: dict[str, dict[str, Any]] = {}
        wanted = set(files)
        for name in self._metadata_files(files):
            about = (self.path / name).stat()
            for picture, row in _rows(self.path / name, about.st_size, about.st_mtime_ns).items():
                if (inside := (Path(name).parent / picture.replace("\\", "/")).as_posix()) in wanted:
                    found[inside] = row
        return found

    def _metadata_files(self, files: Sequence[str]) -> list[str]:
        folders = sorted({str(folder) for name in files for folder in Path(name).parents})
        names = [(Path(folder) / name).as_posix() for folder in folders for name in METADATA]
        return [name for name in names if (self.path / name).is_file()]

    def unread_lists(self) -> list[str]:
        """Returns the names of tables beside the pictures that are not called as those that are read."""
        endings = tuple(Path(name).suffix for name in METADATA)
        return sorted(n for n in os.listdir(self.path) if n.lower().endswith(endings) and n not in METADATA)


def read_folder(
    path: str | Path, files: Sequence[str], captions: CaptionChoice, contents: Contents | None = None
) -> Iterator[Sample | Reject]:
    """Yields the samples of a chunk of a folder, in the order of their keys.

    Raises, at the call: ValueError where a list cannot be read. At any time: OSError if a file cannot.
    """
    folder = PictureFolder(Path(path))
    fields = folder.metadata(files)
    return _samples(folder, files, fields, captions, Contents() if contents is None else contents)


def _samples(
    folder: PictureFolder, files: Sequence[str], fields: dict, captions: CaptionChoice, contents: Contents
) -> Iterator[Sample | Reject]:
    for key, names in groupby(files, key=lambda name: _split(name)[0]):
        group = Members(key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"), captions)
        more: dict[str, Any] = {}
        for name in names:
            extension, file = _split(name)[1], folder.path / name
            more |= fields.get(name, {})
            if not file.is_file():  # opening a pipe would wait for ever
                file.stat()
                group.reject("unsafe_member", f"{name!r} is no regular file")
            if group.wants(name, extension, file.stat().st_size):
                group.keep(extension, file.read_bytes())
        yield group.outcome(contents, more)


def _split(name: str) -> tuple[str, str]:
    """Splits a path at the last dot of its name: key, extension in lower case. The key of `cat.jpg.txt` is `cat`."""
    key, _, extension = name.rpartition(".")
    if not key or key.endswith("/") or "/" in extension:
        return name, ""
    picture, picture_extension = _split(key) if extension.lower() not in _PICTURES else (key, "")
    return (picture if picture_extension in _PICTURES else key), extension.lower()


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError as error:
        if not path.is_symlink():
            raise
        raise FileNotFoundError(
            f"{path} is a link to {os.readlink(path)}, which is not there; mend or remove it"
        ) from error


@lru_cache(maxsize=4)  # the chunks of a folder share it
def _rows(path: Path, size: int, changed: int) -> dict[str, dict[str, Any]]:
    """Reads a list: the fields by `file_name`. Raises ValueError."""
    try:
        rows = (
            read_rows(path) if path.suffix == ".parquet" else _parse(path.read_text(encoding="utf-8-sig"), path.suffix)
        )
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); mend it, or remove it") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            there = f"it has {', '.join(map(repr, row))}" if isinstance(row, dict) else "it is no object"
            raise ValueError(f"{path}: row {number} has no file_name that names a picture: {there}"[:400])
    return {row["file_name"]: {k: v for k, v in row.items() if k != "file_name"} for row in rows}


def _parse(text: str, suffix: str) -> list[Any]:
    if suffix == ".jsonl":
        return [json.loads(line) for line in _lines(text)]
    return list(csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ","))


def _lines(text: str) -> list[str]:
    """Returns the lines of a JSON-lines file; its texts may hold \\u2028, which is no end of a line."""
    return [line for line in text.split("\n") if line.strip()]
