"""Storage without a network: which addresses are taken, what a pattern finds, and how often a failure is tried again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep.common import storage
from data_prep.common.storage import Remote, Unreachable, is_remote, open_file


class Flaky(MemoryFileSystem):
    """A file system in memory whose next `failures` requests fail."""

    cachable = False
    failures = 0
    error: type[Exception] = ConnectionError

    def _fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise self.error("the line is down")

    def put_file(self, *args: Any, **options: Any) -> None:
        self._fail()
        super().put_file(*args, **options)

    def exists(self, *args: Any, **options: Any) -> bool:
        self._fail()
        return super().exists(*args, **options)

    def _open(self, *args: Any, **options: Any) -> Any:
        self._fail()
        return super()._open(*args, **options)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Flaky:
    system = Flaky()
    system.store, system.pseudo_dirs = {}, [""]
    monkeypatch.setattr(storage, "file_system", lambda url: (system, f"/{url.partition('://')[2]}"))
    return system


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited."""
    seconds: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.mark.parametrize(
    ("url", "remote"), [("tars/0.tar", False), ("/a:b.tar", False), ("s3://b/x", True), ("https://h/x.tar", True)]
)
def test_what_is_remote(url: str, remote: bool) -> None:
    assert is_remote(url) is remote


@pytest.mark.parametrize("url", ["pipe:cat x", "ftp://h/x.tar", "simplecache::s3://b/x", "file:///x.tar"])
def test_nothing_else_is_opened(url: str) -> None:
    with pytest.raises(ValueError, match="commands are never run"):
        is_remote(url)


def test_an_upload_is_tried_again(flaky: Flaky, waits: list[float], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"content")
    remote = Remote("s3://bucket/data/")
    flaky.failures = 4
    remote.upload(tmp_path / "x", "folder/x")
    assert waits == [1, 2, 4, 8] and remote.sizes("folder") == {"folder/x": 7}
    flaky.failures = 5
    with pytest.raises(Unreachable, match=r"s3://bucket/data/y: ConnectionError: the line is down; check the address"):
        remote.upload(tmp_path / "x", "y")
    assert waits == 2 * [1, 2, 4, 8]


def test_files_come_back_and_go(flaky: Flaky, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in "ab":
        (tmp_path / "folder" / name).write_text(name)
    remote = Remote("s3://bucket")
    remote.upload(tmp_path / "folder", "there")
    assert remote.download("there/b", tmp_path / "new" / "b") and (tmp_path / "new" / "b").read_text() == "b"
    assert not remote.download("there/c", tmp_path / "c") and not (tmp_path / "c").exists()
    remote.remove("there")
    remote.remove("there")
    assert remote.sizes("") == {}


def test_a_tar_is_read_on_where_the_connection_broke(flaky: Flaky, waits: list[float]) -> None:
    flaky.pipe_file("/bucket/0.tar", bytes(range(100)))
    with open_file("s3://bucket/0.tar") as tar:
        first = tar.read(60)
        ended = SimpleNamespace(read=lambda size: b"", size=100, tell=lambda: 60, close=lambda: None)
        tar._file = ended  # type: ignore[attr-defined]
        flaky.failures = 2
        assert first + tar.read(60) == bytes(range(100))
    assert waits == [1, 2, 4]


def test_a_tar_that_is_not_there_is_not_waited_for(flaky: Flaky, waits: list[float]) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"), open_file("s3://bucket/1.tar") as tar:
        tar.read(1)
    flaky.pipe_file("/bucket/0.tar", b"x")
    flaky.failures = 9
    with pytest.raises(Unreachable, match="cannot be read at byte 0"), open_file("s3://bucket/0.tar") as tar:
        tar.read(1)
    assert waits == [1, 2, 4, 8] and flaky.failures == 4
