"""Paths as people write them: `~` and variables of the environment, which no shell expands in `key=~/x` or in a YAML file."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

# ${name} in small letters is left alone: in a config it is another field's value.
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Z_][A-Z0-9_]*)\})")


def expand(text: str) -> str:
    """A path or URL with `~`, `$NAME` and `${NAME}` replaced. Raises ValueError for a variable or home that is not there."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"{text}: ${name} is not set; set it, or write the path out")
        return os.environ[name]

    expanded = os.path.expanduser(VARIABLE.sub(value, text))
    if re.match(r"~\w*(/|$)", expanded):
        raise ValueError(f"{text}: no home folder is known for it; write the path out (a file of this name: ./{text})")
    return expanded


def path(text: str) -> Path:
    """The type of an argument that is a path."""
    return Path(path_or_url(text))


def folder(text: str) -> Path:
    """The type of an argument that is a folder to write into, which may be there."""
    found = path(text)
    if found.exists() and not found.is_dir():
        raise argparse.ArgumentTypeError(f"{found} is a file; give a folder")
    return found


def path_or_url(text: str) -> str:
    """The type of an argument that is a path, a pattern of them, or a URL."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Names of folders, no longer than it takes to tell them apart: the last part, or the last two, …; the whole path at most."""
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts), default=0)):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path.absolute()) for path in paths]
