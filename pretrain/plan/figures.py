"""Figures of a plan with how each is computed, as text, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.common.files import atomic_write


@dataclass(frozen=True)
class Figure:
    """One figure of a plan.

    Attributes:
        about: the stage, or `all stages`.
        part: its subject, such as `memory`.
        value: a number, or a word where there is no number.
        how: how it is computed.
    """

    about: str
    part: str
    name: str
    value: float | int | str
    unit: str
    how: str


def number(value: float | int | str) -> str:
    """A value for people: whole numbers whole, others with four digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def to_text(figures: Iterable[Figure]) -> str:
    """A table with a heading for each stage and part."""
    lines: list[str] = []
    about = part = ""
    for f in figures:
        if f.about != about:
            lines += ["", f.about] if lines else [f.about]
        if (f.about, f.part) != (about, part):
            lines.append(f"  {f.part}")
        about, part = f.about, f.part
        lines.append(f"    {f.name:<44}{number(f.value):>16} {f.unit:<14} {f.how}".rstrip())
    return "\n".join(lines)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same fields."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(figures: Sequence[Figure], setting: Mapping[str, Any], folder: Path) -> None:
    """Writes plan.txt, plan.csv and plan.json."""
    rows = [asdict(f) for f in figures]
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "plan.txt", to_text(figures) + "\n")
    atomic_write(folder / "plan.csv", to_csv(rows))
    atomic_write(folder / "plan.json", json.dumps({"setting": setting, "figures": rows}, indent=1) + "\n")
