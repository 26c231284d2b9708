"""One training in a run directory: real processes, alive, killed, stopped; and file systems without locks between nodes."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep.worker import claims
from data_prep.worker.claims import claim_path
from pretrain.distributed.world import World
from pretrain.resilience import run_lock
from pretrain.resilience.run_lock import NAME, RunLock, lock_problems

ALONE = World.alone()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, lines: list[str]) -> Iterator[Callable[..., RunLock]]:
    """Makes the lock of a run; a claim counts as dead after 3 s."""
    made: list[RunLock] = []

    def build(folder: str = "runs/one", seconds: float = 3.0) -> RunLock:
        made.append(RunLock(tmp_path / folder, ALONE, lines.append, seconds))
        return made[-1]

    yield build
    for lock in made:
        lock.release()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """Another process that is in the run directory."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            lock = RunLock(tmp_path / "runs/one", ALONE, print, 3.0)
            lock.acquire()
            os.write(tell, b"1")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"1"
    yield pid
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def other_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this process is one of another node, to which no lock is passed on."""
    here = claims.this_process()
    monkeypatch.setattr(claims, "this_process", lambda: here | {"boot": "another", "host": "n2"})
    monkeypatch.setattr(run_lock, "this_process", lambda: here | {"boot": "another"})
    monkeypatch.setattr(run_lock, "lock", lambda file: True)


def test_the_second_is_refused_and_told_who_the_first_is(holder: int, make, tmp_path: Path, lines) -> None:
    said = rf"^run_dir: \S+/runs/one is in use by the training of \S+ \(process {holder}\), which started at 20\d\d-.*; wait"
    with pytest.raises(ValueError, match=said):
        make().acquire()
    (problem,) = lock_problems(tmp_path / "runs/one")
    assert f"(process {holder})" in problem
    assert lines == [] and claim_path(tmp_path / "runs/one", NAME).exists()


def test_another_name_of_the_folder_is_the_same_run(holder: int, make, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    with pytest.raises(ValueError, match=rf"link/one is in use by the training of \S+ \(process {holder}\)"):
        make("link/one").acquire()


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_one_keeps_nothing(death: signal.Signals, holder: int, make, tmp_path: Path, lines) -> None:
    os.kill(holder, death)
    os.waitpid(holder, 0)
    assert lock_problems(tmp_path / "runs/one") == []
    make().acquire()
    assert lines == []  # at once


def test_one_that_stands_still_keeps_its_run(holder: int, make) -> None:
    """`scontrol suspend`, Ctrl-Z: it may go on at any time."""
    os.kill(holder, signal.SIGSTOP)
    with pytest.raises(ValueError, match="is in use by"):
        make(seconds=0.01).acquire()


def test_a_dead_one_of_another_container_of_this_machine(make, tmp_path: Path, lines) -> None:
    """Its process cannot be looked up there, but the kernel's lock tells."""
    make().acquire()
    claim = claim_path(tmp_path / "runs/one", NAME)
    content = json.loads(claim.read_text())
    make().release()
    (tmp_path / "runs/two").mkdir()
    claim_path(tmp_path / "runs/two", NAME).write_text(json.dumps(content | {"pid_namespace": 1, "token": "x"}))
    make("runs/two", seconds=1e6).acquire()
    assert lines == []


def test_one_of_another_node_is_seen_by_its_heartbeats(holder: int, make, monkeypatch, lines) -> None:
    other_node(monkeypatch)
    with pytest.raises(ValueError, match=rf"\(process {holder}\)"):
        make().acquire()
    assert len(lines) == 1 and "looking for 3 s whether the training of " in lines[0]


def test_a_dead_one_of_another_node_is_given_up_in_the_end(holder: int, make, monkeypatch, lines) -> None:
    """And where it only stood still, it learns of that before it writes again."""
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    other_node(monkeypatch)
    lock = make(seconds=0.3)
    lock.acquire()
    assert len(lines) == 1
    lock.require()
    claim_path(lock.run_dir, NAME).write_text(json.dumps({"host": "n3", "pid": 7, "slurm_job": "12", "since": "noon"}))
    with pytest.raises(
        RuntimeError, match=r"taken over by the training of n3 \(process 7, job 12\), which started at noon"
    ):
        lock.require()


def test_a_file_system_without_locks(holder: int, make, monkeypatch) -> None:
    monkeypatch.setattr(run_lock, "lock", lambda file: False)
    with pytest.raises(ValueError, match=rf"\(process {holder}\)"):
        make().acquire()


def test_a_refused_start_leaves_no_folder(make, tmp_path: Path) -> None:
    for accepted in (False, True):
        lock = make("new/runs/one")
        lock.acquire()
        (lock.run_dir / "tensorboard").mkdir()
        if accepted:
            lock.keep()
        lock.release()
        assert (tmp_path / "new").exists() == accepted
    assert sorted(p.name for p in (tmp_path / "new/runs/one").iterdir()) == [".lock", "tensorboard"]


def test_a_refused_start_leaves_what_others_made(make, tmp_path: Path) -> None:
    (tmp_path / "runs/one").mkdir(parents=True)
    lock, sibling = make(), make("new/one")
    for each in (lock, sibling):
        each.acquire()
    (tmp_path / "new/other").mkdir()
    for each in (lock, sibling):
        each.release()
    assert (tmp_path / "runs/one").exists() and (tmp_path / "new/other").exists()
    assert not (tmp_path / "new/one").exists()


def test_nothing_goes_on_after_the_end(make) -> None:
    lock = make()
    lock.acquire()
    lock.release()
    lock.release()
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
