"""Helpers of the tests of private interfaces: what docs/dependencies.md lists, and what the code reaches."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping

from support import ROOT


def documented(file: str) -> set[str]:
    """The names, with their owners, of the table in docs/dependencies.md whose heading names this file."""
    sections = (ROOT / "docs/dependencies.md").read_text().split("\n## ")
    (section,) = [s for s in sections if f"`{file}`" in s.splitlines()[0]]
    return set(re.findall(r"^\| `([\w.]+)` \|", section, re.MULTILINE))


def listed(private: Mapping[str, Iterable[str]]) -> set[str]:
    """The names, with their owners, of a file's table PRIVATE."""
    return {f"{owner}.{name}" for owner, names in private.items() for name in names}


def reached(file: str, *holders: str) -> set[str]:
    """The attributes that a file reaches of expressions such as `self._zero`, by `ast.unparse`'s spelling."""
    tree = ast.parse((ROOT / file).read_text())
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in holders}


def underscored(file: str) -> set[str]:
    """Names with a leading underscore that a file reaches of anything but itself, `object.name` each."""
    tree = ast.parse((ROOT / file).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            holder, name = ast.unparse(node.value), node.attr
            if holder not in ("self", "cls", "super()") and name.startswith("_") and not name.startswith("__"):
                found.add(f"{holder}.{name}")
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name.startswith("_")}
    return found
