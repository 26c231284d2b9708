"""Damages and files of a data set: what is listed, what cannot be read, and how a difference is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.checks.damage import Damage, DamagedFile, Files, collect_damage, difference


def test_files_are_listed_without_work(tmp_path: Path) -> None:
    for name in ("dataset.json", "reports/a/1.json", "reports/a/0.json", "reports/a/0.jsonl", "work/x", "a/64/work/y"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("abc")
    files = Files(str(tmp_path), tmp_path / "unused")
    files.list_files()
    assert set(files.sizes) == {
        *("dataset.json", "reports/a/0.json", "reports/a/1.json", "reports/a/0.jsonl", "a/64/work/y")
    }
    assert set(files.sizes.values()) == {3}
    assert files.parts() == ["a/0", "a/1"]


def test_what_cannot_be_read_is_a_damage(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "text").write_text("{")
    files = Files(str(tmp_path), tmp_path / "unused")
    files.list_files()
    assert files.read("bytes") == b"\xff" and files.text("text") == "{"
    damages: list[Damage] = []
    for read, name in ((files.read, "none"), (files.text, "bytes"), (files.json, "text")):
        with collect_damage(damages, "a/0"):
            read(name)
    assert [d.problem.partition(" (")[0] for d in damages] == ["is missing", "is no UTF-8", "is no JSON"]
    assert str(damages[0]) == "none: is missing; --repair makes a/0 again"
    assert str(Damage("x", "is bad")) == "x: is bad; --repair writes it again"
    with pytest.raises(ZeroDivisionError), collect_damage(damages):
        raise ZeroDivisionError
    assert str(DamagedFile("x", "is bad")) == "x: is bad"


def test_the_first_difference_in_words() -> None:
    assert difference({"a": 1, "b": {"c": [2]}}, {"a": 1, "b": {"c": [2]}}) is None
    assert difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}) == "b.c is 2, the parts give 3"
    assert difference({"more": 1}, {}) == "more is 1, the parts give null"
    words = difference({"a": "é" * 100}, {"a": ""})
    assert words is not None and len(words) < 100 and "…" in words
