"""Check of the files over all parts: the card and the named parts; test_verify.py damages whole data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep import schema
from data_prep.checks.damage import Files
from data_prep.checks.data_set import parts_in_report, read_card


def files_of(root: Path) -> Files:
    files = Files(str(root), root / "unused")
    files.list_files()
    return files


def test_the_card_or_why_not(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither dataset\.json nor reports/"):
        read_card(files_of(tmp_path))
    schema.write_file(tmp_path, "reports/a/0.json", "{}")
    card, damages = read_card(files_of(tmp_path))
    assert card is None and [str(d).partition(";")[0] for d in damages] == ["dataset.json: is missing"]
    schema.Card({}, {}, 5, "mean", [64]).save(tmp_path)
    assert read_card(files_of(tmp_path)) == (schema.Card.load(tmp_path), [])
    (tmp_path / schema.CARD).write_text("[]")
    card, damages = read_card(files_of(tmp_path))
    assert card is None and damages[0].problem == "is damaged, was changed by hand, or is of another version"


def test_only_names_that_can_be_parts_are_believed(tmp_path: Path) -> None:
    names = ["a/0", "a/..", "../x", "a/b/c", "/a", "a/é (1)"]
    (tmp_path / "report.json").write_text(json.dumps({"parts": [{"part": name} for name in names]}))
    assert parts_in_report(files_of(tmp_path)) == {"a/0", "a/é (1)"}
    (tmp_path / "report.json").write_text('{"parts": 5}')
    assert parts_in_report(files_of(tmp_path)) == set()
