"""Tables of documents that functions compute: each stands between `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

Tables = Mapping[str, Callable[[], Iterable[str]]]
"""The lines of each table by its name."""


def with_tables(text: str, tables: Tables) -> str:
    """A document with its tables computed anew."""
    for name, rows in tables.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        assert begin and end, name
        text = before + begin + "\n".join(rows()) + "\n" + end + after
    return text
