"""Files that are absent, old, or whole."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from data_prep.common import files
from data_prep.common.files import atomic_write, temporary_name


def test_text_and_bytes(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "é")
    atomic_write(tmp_path / "b", b"\xff")
    assert (tmp_path / "a").read_bytes() == "é".encode() and (tmp_path / "b").read_bytes() == b"\xff"
    atomic_write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("failing", ["fsync", "write"])
def test_a_failure_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    (tmp_path / "work").mkdir()
    atomic_write(tmp_path / "a", "old")

    def full(*_: object) -> None:
        assert len(list((tmp_path / "work").iterdir())) == 1, "the temporary file lies in its folder"
        raise OSError(errno.ENOSPC, "full")

    if failing == "fsync":
        monkeypatch.setattr(files.os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="full"):
        atomic_write(tmp_path / "a", "new", temporary_folder=tmp_path / "work")
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "work"] and not list((tmp_path / "work").iterdir())


def test_temporary_names_differ_and_are_hidden() -> None:
    names = {temporary_name("x") for _ in range(100)}
    assert len(names) == 100 and all(name.startswith(".tmp-x-") for name in names)
