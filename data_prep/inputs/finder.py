"""Finder of inputs: the tars, Parquet files and folders of pictures that `--input` names, each with its size and last change.

A folder gives its tars, or else its Parquet files, or else the pictures in it and in its folders. A pattern may have `*`, `**`,
`?`, `[…]` and, as webdataset's, braces and `::` between several: `{00000..00123}.tar`. What exists under a name with brackets or
braces is meant literally.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath

from webdataset.shardlists import expand_urls

from data_prep.common.storage import is_remote, remote_files
from data_prep.common.words import counted
from data_prep.inputs.folders import PictureFolder
from data_prep.inputs.parquet_files import is_list
from data_prep.inputs.samples import IMAGE_EXTENSIONS
from data_prep.inputs.tars import TAR_SUFFIXES, tar_stem

PARQUET_SUFFIX = ".parquet"


@dataclass(frozen=True)
class Found:
    """Input that becomes one part.

    Attributes:
        part: the part's name.
        url: the path or URL of a tar or Parquet file, or the folder of some pictures.
        bytes: its size; 0 where that is not known.
        changed: its last change, or what else changes with its content; "" where nothing is known of it.
        files: of pictures, their files and those beside them, by their names within the folder.
    """

    part: str
    url: str
    bytes: int
    changed: str
    files: tuple[str, ...] = ()


def find_inputs(pattern: str) -> list[Found]:
    """Finds what a path, a pattern or a URL names, sorted by path.

    Raises:
        FileNotFoundError: there is nothing, or one of a list in braces is missing.
        ValueError: a scheme that is not supported, or a pattern that cannot be read.
    """
    if Path(pattern).exists():
        return list(_local(Path(pattern)))
    found: dict[str, Found] = {}
    for piece in pattern.split("::"):
        remote = is_remote(piece)
        for each in _remote(piece) if remote else _matches(piece):
            found[f"{each.url}/{each.part}"] = each
    return [found[name] for name in sorted(found)]


def last_change(url: str, files: Sequence[str] = ()) -> tuple[int, str]:
    """Returns size and last change of a local input as they are now. Raises FileNotFoundError."""
    return PictureFolder(Path(url)).stamp(files) if files else _stamp(Path(url))


def is_parquet(url: str) -> bool:
    """Returns whether a path or URL is read as a Parquet file."""
    return url.lower().endswith(PARQUET_SUFFIX)


def counted_inputs(urls: Sequence[str]) -> str:
    """Returns the number of inputs and what they are called: `3 tars`, or `3 inputs` where some are Parquet files or folders."""
    tars = all(url.lower().endswith(TAR_SUFFIXES) for url in urls)
    return counted(len(urls), "tar" if tars else "input")


def _stamp(path: Path) -> tuple[int, str]:
    about = path.stat()
    seconds, nanoseconds = divmod(about.st_mtime_ns, 10**9)
    moment = datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    return about.st_size, f"{moment}.{nanoseconds:09d}Z"


def _matches(pattern: str) -> Iterator[Found]:
    """Yields what a local pattern gives. As much of its beginning as exists is literal."""
    parent = next(parent for parent in Path(pattern).parents if parent.exists())
    for rest in _expanded(str(Path(pattern).relative_to(parent)), pattern):
        names = glob.glob(rest, root_dir=parent, recursive=True)
        if not names:  # each name of a list in braces must be there
            raise FileNotFoundError(f"{parent / rest}: no such file; {_content(parent)}")
        for name in sorted(names):
            yield from _local(parent / name)


def _expanded(pattern: str, whole: str) -> list[str]:
    try:
        return expand_urls(pattern)
    except AssertionError as error:  # webdataset's, of ${NAME}
        raise ValueError(f"{whole}: {error}; ${{NAME}} stands for the environment's WDS_NAME") from error
    except ValueError as error:
        raise ValueError(f"{whole}: {error}; a path with braces must exist as it is written") from error


def _local(path: Path) -> Iterator[Found]:
    """Yields a file, or what a folder holds."""
    # A folder that is called like a tar is a tar that cannot be read.
    if not path.is_dir() or path.name.lower().endswith(TAR_SUFFIXES):
        if path.name.lower().endswith(tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)):
            raise ValueError(f"{path} is one picture; give the folder that it is in, {path.parent}")
        yield _file(str(path), *_stamp(path))
        return
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    tars, tables = ([n for n in names if n.lower().endswith(end)] for end in (TAR_SUFFIXES, PARQUET_SUFFIX))
    folder = PictureFolder(path)
    archives: list[str] = []
    chunks: list[tuple[str, ...]] = []
    if not tars and (not tables or is_list(path / tables[0])):
        archives, chunks = folder.chunks((*TAR_SUFFIXES, PARQUET_SUFFIX))
    if tars or (tables and not chunks):
        for name in tars or tables:
            yield _file(str(path / name), *_stamp(path / name))
        return
    archives = [name for name in archives if name not in tables]  # img2dataset lists in them what lies in its folders
    if archives or not chunks:
        there = f"; those in its folders are found by '{path}/**/*{Path(archives[0]).suffix}'" if archives else ""
        raise FileNotFoundError(
            f"{path} exists, but holds no *.tar, no *.parquet and no pictures: {_content(path)}{there}"
        )
    name = path.resolve().name or "pictures"
    for number, chunk in enumerate(chunks):
        folder.metadata(chunk)  # a mistake in it is said before the work begins
        yield Found(f"{name}-{number:05d}", str(path), *folder.stamp(chunk), chunk)


def _file(url: str, size: int, changed: str) -> Found:
    return Found(tar_stem(PurePosixPath(url).name), url, size, changed)


def _content(folder: Path) -> str:
    """Says in a few words what a folder holds."""
    kinds: Counter[str] = Counter()
    for entry in os.scandir(folder):
        kinds["folder" if entry.is_dir() else "".join(Path(entry.name).suffixes[-2:]) or "file"] += 1
    words = [
        f"{count} {kind}" if kind.startswith(".") else counted(count, kind)
        for kind, count in sorted(kinds.items(), key=lambda item: (item[0] != "folder", -item[1], item[0]))[:8]
    ]
    return f"{'it' if folder != Path() else 'this folder'} has {', '.join(words)}" if words else "it is empty"


def _remote(pattern: str) -> Iterator[Found]:
    scheme, _, rest = pattern.partition("://")
    for single in _expanded(rest, pattern):
        matches = remote_files(f"{scheme}://{single}", (TAR_SUFFIXES, (PARQUET_SUFFIX,)))
        if not matches:
            raise FileNotFoundError(f"{scheme}://{single}: no such file, and no folder with *.tar or *.parquet")
        for url, (size, changed) in matches.items():
            yield _file(url, size, changed)
