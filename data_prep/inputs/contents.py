"""Contents of a tar, Parquet file or folder: which members and fields its samples have, and whether it is whole.

They are counted while the samples are read, for the report and for the first lines of a run, which propose `--captions`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Further or longer names of fields are not counted: a hostile json may have any number.
MAX_NAMES, MAX_NAME_LENGTH = 100, 60
TEXT_MEMBERS = (".txt", ".caption", ".text", ".cap", ".prompt", ".alt")
# Fields that mostly hold captions, where a sample has them; the first that all samples have is proposed.
LIKELY_CAPTIONS = ("caption", "recaption", "text", "prompt", "description", "alt", "alt_text", "title", "label")


@dataclass
class Contents:
    """What the samples of a tar, Parquet file or folder have.

    Attributes:
        samples: groups of members, or rows, that were looked at.
        members: samples by the extensions of their members, with the dot.
        fields: samples by the fields of their json or row.
        texts: samples by the fields, and members by name, that may be captions.
        incomplete: what is missing, where the file is cut or damaged.
    """

    samples: int = 0
    members: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    incomplete: str = ""

    def add(self, extensions: Iterable[str], fields: Mapping[str, Any]) -> None:
        """Counts a sample with these members and fields."""
        self.samples += 1
        members = [f".{extension}" for extension in extensions]
        _count(self.members, members)
        _count(self.fields, fields)
        _count(self.texts, texts_of(members, fields))

    def proposals(self) -> list[str]:
        """Returns the names that `--captions` could take, the most likely first."""

        def rank(name: str) -> tuple[int, int, str]:
            known = LIKELY_CAPTIONS.index(name) if name in LIKELY_CAPTIONS else len(LIKELY_CAPTIONS)
            return -self.texts[name], known, name

        return sorted(self.texts, key=rank)


def texts_of(members: Iterable[str], fields: Mapping[str, Any]) -> list[str]:
    """Returns the members (".txt") and fields of a sample that may be captions, by their names or by what they hold."""
    named = [name for name in members if name in TEXT_MEMBERS]
    return named + [name for name, value in fields.items() if _may_be_caption(name, value)]


def with_nested(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns fields with those of the objects in them: of `{"text": {"long": …}}` also `text.long`. Raises RecursionError."""
    named = {prefix + name: value for name, value in fields.items()}
    for name, value in fields.items():
        if isinstance(value, dict):
            named |= {n: v for n, v in with_nested(value, f"{prefix}{name}.").items() if n not in named}
    return named


def _may_be_caption(name: str, value: Any) -> bool:
    """Returns whether a field's value is a text, or a list of texts, in words, and no address, key or time."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(one, str) for one in value) and _may_be_caption(name, value[0])
    if not isinstance(value, str) or not (words := value.strip()) or words[0] in "{[":
        return False
    return name in LIKELY_CAPTIONS or len(words.split()) > 2 or not words.isascii()


def _count(counter: Counter[str], names: Iterable[str]) -> None:
    for name in names:
        if name in counter or (len(counter) < MAX_NAMES and len(name) <= MAX_NAME_LENGTH):
            counter[name] += 1
