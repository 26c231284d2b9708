"""Claims shared by real processes: one owner a name, and take-over of the dead only, be they killed, stopped or unknown."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import ROOT

from data_prep.common import files
from data_prep.worker import claims
from data_prep.worker.claims import Claims

TIMEOUT = 2.0
WORKER = """
import sys, time
from pathlib import Path
from data_prep.worker.claims import Claims

def won(names, until=lambda: False):  # those of the names that this worker gets, trying until then
    mine = []
    while True:
        mine += [name for name in names if name not in mine and claims.claim(name)]
        if len(mine) == len(names) or not until():
            return mine

def work(names, done):  # what this worker did of them
    mine = []
    for name in claims.take(names, lambda: [path.name for path in done.iterdir()]):
        time.sleep(0.02)
        (done / name).touch()
        mine.append(name)
    return mine

with Claims(Path(sys.argv[1]), float(sys.argv[2])) as claims:
    for line in sys.stdin:
        print(repr(eval(line)), flush=True)
"""


class Worker:
    """A real process with claims, which evaluates what it is asked."""

    def __init__(self, folder: Path, timeout: float, *prefix: str):
        command = [*prefix, sys.executable, "-c", WORKER, str(folder), str(timeout)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, bufsize=1
        )
        self.ask("None")  # it is up

    def send(self, expression: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(expression + "\n")

    def answer(self) -> object:
        assert self.process.stdout
        return eval(self.process.stdout.readline())

    def ask(self, expression: str) -> object:
        self.send(expression)
        return self.answer()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts a worker: its timeout, then the command that starts it, if any."""
    started: list[Worker] = []

    def start(timeout: float = TIMEOUT, *prefix: str) -> Worker:
        started.append(Worker(tmp_path, timeout, *prefix))
        return started[-1]

    yield start
    for one in started:
        one.signal(signal.SIGKILL)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Claims]:
    """The claims of this process."""
    with Claims(tmp_path, TIMEOUT) as claims:
        yield claims


@pytest.fixture
def namespace() -> tuple[str, ...]:
    """The command in front of another that puts it in a new PID namespace; with its death, that one's process dies."""
    command = ("unshare", "--pid", "--fork", "--kill-child=SIGKILL")
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a new PID namespace needs unshare and root: {error}")
    return command


def wait_until(condition: Callable[[], object], seconds: float = 20) -> float:
    """How long it took until then."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, "it never happened"
        time.sleep(0.02)
    return time.monotonic() - start


def content(folder: Path, name: str) -> bytes:
    return (folder / f"{name}.claim").read_bytes()


def wait_for_beat(folder: Path, name: str) -> None:
    before = content(folder, name)
    wait_until(lambda: content(folder, name) != before)


def hand_made(folder: Path, claims: Claims, name: str, **changes: object) -> None:
    """A claim as `claims` would write it, but for the changes."""
    (folder / f"{name}.claim").write_text(json.dumps({**claims._owner, "token": "another's", "beat": 0, **changes}))


def test_one_owner_a_name(tmp_path, worker, here):
    names = [f"source {k % 3}/part%2F{k:03}ü" for k in range(200)]
    racers = [worker() for _ in range(4)]
    start = time.time() + 0.3
    for racer in racers:
        racer.send(f"time.sleep(max(0, {start} - time.time())) or won({names})")
    owned = [racer.answer() for racer in racers]
    assert Counter(name for some in owned for name in some) == dict.fromkeys(names, 1)
    assert here.others() == sorted(names)
    assert not any(here.claim(name) for name in names)
    for racer, some in zip(racers, owned, strict=True):
        assert racer.ask(f"[claims.owns(n) for n in {names}]") == [name in some for name in names]


def test_release_and_exit_leave_nothing(tmp_path):
    with Claims(tmp_path, 600) as one:
        with Claims(tmp_path, 600) as other:
            assert all(other.claim(name) for name in "abc")
            assert other.claim("a"), "one's own again"
            one.release("a")
            assert other.owns("a"), "released by another"
            other.release("a")
            other.release("a")
            assert not other.owns("a")
            assert one.claim("a")
            assert not other.claim("a")
            assert one.open_names("abcd") == ["b", "c", "d"]
            assert one.others() == ["b", "c"]
        assert os.listdir(tmp_path) == ["a.claim"]
        assert one.others() == []


def test_a_killed_process_of_this_machine_is_followed_at_once(tmp_path, worker):
    owner, heir = worker(600), worker(600)
    assert owner.ask("[claims.claim('a'), claims.claim('b')]") == [True, True]
    assert heir.ask("claims.claim('a')") is False
    assert heir.ask("claims.others()") == ["a", "b"]
    owner.process.kill()  # and not waited for: a zombie is dead too
    wait_until(lambda: heir.ask("claims.others()") == [])
    assert heir.ask("won(['a'])") == ["a"]
    owner.process.wait()
    assert heir.ask("won(['b'])") == ["b"]
    assert sorted(os.listdir(tmp_path)) == ["a.claim", "b.claim"]


def test_a_process_number_in_new_hands_is_dead(tmp_path, here):
    hand_made(tmp_path, here, "same")
    hand_made(tmp_path, here, "reused", start=here._owner["start"] + 1)  # type: ignore[operator]
    hand_made(tmp_path, here, "other boot", start=0, boot="of another machine")
    assert [here.claim(name) for name in ("same", "reused", "other boot")] == [False, True, False]


def test_another_namespace_is_judged_by_its_heartbeat(tmp_path, worker, here, namespace):
    owner = worker(TIMEOUT, *namespace)
    assert owner.ask("claims.claim('a')") is True
    about = json.loads(content(tmp_path, "a"))
    assert about["boot"] == here._owner["boot"]
    assert about["pid"] == 1, "the number of a process here as well, but started at another time"
    start = time.monotonic()
    while time.monotonic() < start + 1.5 * TIMEOUT:
        assert not here.claim("a")
        time.sleep(0.05)
    assert here.open_names(["a", "b"]) == ["b"], "it was seen to beat"
    owner.signal(signal.SIGKILL)
    assert wait_until(lambda: here.claim("a")) > TIMEOUT / 2, "but for the time since its last beat"


def test_a_foreign_proc_is_not_asked(worker, namespace):
    """`unshare --pid` leaves the /proc of the namespace outside: the numbers there are other processes."""
    owner = worker(600, *namespace)
    assert owner.ask("claims.claim('a')") is True
    inner = Path(f"/proc/{owner.process.pid}/task/{owner.process.pid}/children").read_text().strip()
    neighbour = worker(600, "nsenter", f"--pid=/proc/{inner}/ns/pid")
    assert neighbour.ask("claims._owner['pid_namespace']") == owner.ask("claims._owner['pid_namespace']")
    assert neighbour.ask("claims.claim('a')") is False


def test_a_stopped_owner_loses_and_does_not_clobber(tmp_path, worker, here):
    owner = worker()
    assert owner.ask("claims.claim('a')") is True
    assert here.open_names(["a"]) == ["a"]
    wait_for_beat(tmp_path, "a")
    owner.signal(signal.SIGSTOP)  # between two beats
    assert here.open_names(["a"]) == [], "it was seen to beat"
    assert wait_until(lambda: here.claim("a")) >= TIMEOUT
    owner.signal(signal.SIGCONT)
    time.sleep(TIMEOUT / 2)
    assert owner.ask("claims.owns('a')") is False
    assert here.owns("a")
    owner.ask("claims.release('a')")
    assert here.owns("a")


def test_those_suspended_together_do_not_take_each_other_for_dead(tmp_path, worker):
    owner, other = worker(), worker()
    assert owner.ask("claims.claim('a')") is True
    wait_for_beat(tmp_path, "a")
    assert other.ask("claims.claim('a')") is False
    for one in (owner, other):
        one.signal(signal.SIGSTOP)
    time.sleep(1.5 * TIMEOUT)
    other.signal(signal.SIGCONT)
    assert other.ask("claims.claim('a')") is False, "nobody could beat"
    owner.signal(signal.SIGCONT)
    wait_for_beat(tmp_path, "a")
    assert other.ask("claims.open_names(['a'])") == []


def test_contenders_for_the_dead_have_one_winner(tmp_path, worker, here):
    """Claims of an unknown host, one of them empty, one garbage, one of bytes that are no text."""
    names = [f"{k:02}" for k in range(40)]
    for name in names:
        hand_made(tmp_path, here, name, host="unknown", boot="unknown")
    for name, text in zip(names, (b"", b"garbage {", b"\xff\x00[1]", b"[1]", b'{"boot": 1}'), strict=False):
        (tmp_path / f"{name}.claim").write_bytes(text)
    contenders = [worker(), worker()]
    start = time.monotonic()
    end = "time.sleep(0.01) or claims.open_names(names)"
    for contender in contenders:
        contender.send(f"won({names}, until=lambda names={names}: {end})")
    owned = [contender.answer() for contender in contenders]
    assert time.monotonic() - start >= TIMEOUT
    assert Counter(name for some in owned for name in some) == dict.fromkeys(names, 1)
    for contender, some in zip(contenders, owned, strict=True):
        assert contender.ask(f"[claims.owns(name) for name in {names}]") == [name in some for name in names]
    for contender in contenders:
        contender.process.communicate()  # the end of its input: it exits
    assert os.listdir(tmp_path) == [], "nothing moved aside is left"


@pytest.mark.parametrize("where", ["_is_dead", "temporary_name"], ids=["judging", "renaming"])
@pytest.mark.parametrize("half", [True, False], ids=["half", "whole"])
def test_who_comes_late_to_the_dead_leaves_it_to_the_first(tmp_path, monkeypatch, where, half):
    """The first one does half of its take-over, or the whole, while the late one is judging, or about to rename."""

    def act_first(*arguments: object) -> object:
        monkeypatch.undo()
        deeds.append(os.unlink(tmp_path / "a.claim") if half else first.claim("a"))
        return getattr(late if where == "_is_dead" else claims, where)(*arguments)

    deeds: list[object] = []
    with Claims(tmp_path, 600) as first, Claims(tmp_path, 600) as late:
        hand_made(tmp_path, first, "a", start=0)
        monkeypatch.setattr(late if where == "_is_dead" else claims, where, act_first)
        assert not late.claim("a")
        assert deeds == [None if half else True]
        assert first.owns("a") is not half
        assert os.listdir(tmp_path) == ([] if half else ["a.claim"])


def test_the_heartbeat_outlives_a_full_disk(tmp_path, here, monkeypatch):
    def full(descriptor: int) -> None:
        failures.append(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    failures: list[int] = []
    assert here.claim("a")
    wait_for_beat(tmp_path, "a")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        before = content(tmp_path, "a")
        wait_until(lambda: len(failures) > 1)
        assert content(tmp_path, "a") == before
        assert here.owns("a")
    wait_for_beat(tmp_path, "a")
    assert os.listdir(tmp_path) == ["a.claim"], "the beats that failed left nothing"


def test_all_is_done_once_though_a_worker_dies(tmp_path, worker):
    """Three workers, one killed with work in hand: the others wait for it where they must, and finish all."""
    done, names = tmp_path / "done", [f"{k}" for k in range(12)]
    done.mkdir()
    victim, *rest = worker(600), worker(600), worker(600)  # no beat so soon: it may be dead
    assert victim.ask("claims.claim('7')") is True
    for one in rest:
        one.send(f"work({names}, Path({str(done)!r}))")
    wait_until(lambda: len(list(done.iterdir())) == 11)
    assert not (done / "7").exists()
    victim.signal(signal.SIGKILL)
    worked = [one.answer() for one in rest]
    assert Counter(name for some in worked for name in some) == dict.fromkeys(names, 1)
    assert {path.name for path in done.iterdir()} == set(names)
