"""Commands kept for a repair: what is saved comes back, once for each that differs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.worker.commands import FOLDER, SavedCommand, save_command


def test_what_is_saved_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    root = tmp_path / "data"
    for arguments in (["--input=x", "--buckets"], ["--input=y"], ["--input=y"]):
        save_command(root, arguments, "s3://bucket/data")
    found = SavedCommand.load_all(root)
    assert sorted(c.arguments for c in found) == [["--input=x", "--buckets"], ["--input=y"]]
    assert {(c.directory, c.output) for c in found} == {(str(tmp_path / "here"), "s3://bucket/data")}
    monkeypatch.chdir(tmp_path)
    with found[0].in_directory():
        assert Path.cwd() == tmp_path / "here"
    assert Path.cwd() == tmp_path
    os.rmdir(tmp_path / "here")
    with pytest.raises(ValueError, match="is gone; run it again by hand"), found[0].in_directory():
        pass


def test_none_and_a_damaged_one(tmp_path: Path) -> None:
    assert SavedCommand.load_all(tmp_path) == []
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / "a.json").write_text('{"output": "x"}')
    with pytest.raises(ValueError, match=r"a\.json is damaged .*; remove it, and run encode\.py again by hand"):
        SavedCommand.load_all(tmp_path)
