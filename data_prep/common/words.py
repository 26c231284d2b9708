"""Words for people: numbers with their noun."""

from __future__ import annotations


def counted(count: int, noun: str, nouns: str | None = None) -> str:
    """A number and its noun, such as `1 tar` and `2,000 tars`; `nouns` is a plural that is formed otherwise."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
