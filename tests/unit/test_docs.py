"""docs/operations.md promises what tests show: each row names one that is there, and no test of a fault is left out."""

from __future__ import annotations

import re

from support import ROOT

TESTS = {
    name: path.name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
}


def named() -> list[str]:
    rows = [line for line in (ROOT / "docs/operations.md").read_text().splitlines() if line.startswith("| ")]
    return [row.split("|")[-2].strip() for row in rows if not row.startswith("| what |")]


def test_each_row_names_a_test() -> None:
    names = named()
    assert len(names) > 30
    assert [name for name in names if name.strip("`") not in TESTS] == []


def test_no_test_of_a_fault_is_left_out() -> None:
    faults = {name for name, file in TESTS.items() if file in ("test_faults.py", "test_kills.py", "test_survives.py")}
    assert faults - {name.strip("`") for name in named()} == set()
