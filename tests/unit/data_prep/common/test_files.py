"""Files that are absent, old, or whole."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from data_prep.common import files
from data_prep.common.files import atomic_write, lock, permit_as_umask, sync_path, temporary_name


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


@pytest.mark.parametrize(("code", "lacking"), [(errno.EINVAL, True), (errno.ENOSYS, True), (errno.EIO, False)])
def test_file_systems_that_lack_fsync_or_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, lacking: bool
) -> None:
    """What a file system does not have is not needed; what fails there is a failure."""

    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refused)
    monkeypatch.setattr(fcntl, "lockf", refused)
    with (tmp_path / "lock").open("w") as file:
        for work in (lambda: sync_path(tmp_path), lambda: atomic_write(tmp_path / "a", "b"), lambda: lock(file)):
            if lacking:
                assert not work()
            else:
                with pytest.raises(OSError, match=os.strerror(code)):
                    work()
    assert (tmp_path / "a").exists() == lacking


def test_a_lock_is_held_until_the_file_is_closed(tmp_path: Path) -> None:
    def locked_by_another_process() -> bool:
        pid = os.fork()
        if pid == 0:
            with (tmp_path / "lock").open("w") as file:
                try:
                    lock(file)
                except BlockingIOError:
                    os._exit(1)
                os._exit(0)
        return bool(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    with (tmp_path / "lock").open("w") as file:
        assert lock(file)
        assert locked_by_another_process()
    assert not locked_by_another_process()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_file_is_permitted_as_any_new_one(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "weights"
    path.touch(0o600)
    before = os.umask(umask)
    try:
        permit_as_umask(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [path]
