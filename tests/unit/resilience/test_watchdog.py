"""The watchdog of two processes, its clock and its store given by hand: no thread runs."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from pretrain.distributed.world import World
from pretrain.resilience.heartbeat import IN_STEP
from pretrain.resilience.signals import REQUEUE
from pretrain.resilience.watchdog import ERROR_BEATS, STARTUP_FACTOR, Watchdog

SECONDS = 100.0
BEAT = 5.0


class HandClock:
    """Time that moves when somebody sleeps, or is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.now += seconds


class Notes(dict[str, Any]):
    """A store in this process's memory."""

    timeout = 1.0
    set = dict.__setitem__
    has = dict.__contains__

    def get_all(self, names: list[str]) -> list[Any]:
        return [self[name] for name in names]


class Exit(BaseException):
    """The process has ended."""


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def pair(clock: HandClock, monkeypatch: pytest.MonkeyPatch) -> tuple[Watchdog, Watchdog]:
    """The watchdogs of both processes, on one store; an exit raises Exit with its code."""

    def leave(code: int) -> None:
        raise Exit(code)

    monkeypatch.setattr("os._exit", leave)
    notes: Any = Notes()
    zero, one = (Watchdog(World(r, 2, torch.device("cpu")), SECONDS, clock, lambda _: notes) for r in range(2))
    return zero, one


def exchange(*alive: Watchdog) -> None:
    """One beat of these processes."""
    for watchdog in alive:
        watchdog.post(watchdog._store)
    for watchdog in alive:
        watchdog.read()


def step(watchdog: Watchdog, number: int) -> None:
    watchdog.begin(IN_STEP)
    watchdog.finish_step(number)
    watchdog.begin("reading data")


def test_a_heartbeat_tells_step_activity_and_time(pair, clock) -> None:
    zero, one = pair
    assert zero.heartbeat().limit == STARTUP_FACTOR * SECONDS
    step(zero, 4)
    clock.now += 7
    exchange(zero, one)
    seen = one.peers[0].heartbeat
    assert (seen.step, seen.activity, seen.idle, seen.limit) == (4, "reading data", 7.0, SECONDS)
    assert one.peers[0].heard_at == clock.now


def test_nothing_happens_while_both_make_progress(pair, clock) -> None:
    for number in range(100):
        for watchdog in pair:
            step(watchdog, number)
        exchange(*pair)
        for watchdog in pair:
            watchdog.check(BEAT)
        clock.now += BEAT


def test_a_process_that_falls_silent_ends_the_other_and_is_named(pair, clock, capfd) -> None:
    zero, one = pair
    for watchdog in pair:
        step(watchdog, 1)
    exchange(zero, one)
    while clock.now <= 1000 + SECONDS:
        zero.begin(IN_STEP)
        exchange(zero)
        zero.check(BEAT)
        clock.now += BEAT
    with pytest.raises(Exit, match=str(REQUEUE)):
        zero.check(BEAT)
    told = capfd.readouterr().err
    assert "watchdog: process 1 on " in told and "gave no sign of life for 105 s; all processes end" in told
    assert "1 steps done, reading data for 0 s" in told
    assert "where process" not in told  # a traceback is for one at fault alone


def test_a_process_that_hangs_shows_where_it_is_and_the_first_one_alive_reports(pair, clock, capfd) -> None:
    zero, one = pair
    for watchdog in pair:
        step(watchdog, 3)
    zero.begin(IN_STEP)
    clock.now += SECONDS + 1
    exchange(zero, one)
    for watchdog, reports in ((zero, True), (one, False)):
        with pytest.raises(Exit, match=str(REQUEUE)):
            watchdog.check(BEAT)
        told = capfd.readouterr().err
        assert ("no step for 100 s; process 1 on" in told) == reports
        assert ("watchdog: where process 1 is:\n" in told and "test_watchdog.py" in told) != reports


def test_the_one_that_does_not_report_ends_last(pair, clock) -> None:
    """The launcher ends all with the first: the report must be out by then, though it may be noticed a beat later."""
    zero, one = pair
    for watchdog in pair:
        step(watchdog, 3)
    clock.now += SECONDS + 1
    exchange(zero, one)
    took = []
    for watchdog in pair:
        start = clock.now
        with pytest.raises(Exit):
            watchdog.check(BEAT)
        took.append(clock.now - start)
    assert took[1] > took[0] + BEAT


def test_a_process_that_was_itself_stopped_blames_nobody(pair, clock) -> None:
    zero, one = pair
    for watchdog in pair:
        step(watchdog, 1)
    exchange(zero, one)
    clock.now += 10 * SECONDS
    zero.check(10 * SECONDS)  # its own pause: all have their time again
    clock.now += SECONDS + 1
    with pytest.raises(Exit):
        zero.check(BEAT)


# ---- errors ----


def test_an_error_of_its_own_is_posted_and_ends_the_other_with_its_code(pair, clock, capfd) -> None:
    zero, one = pair
    exchange(zero, one)
    assert one.explain(ValueError("no such shard")) == ("no such shard", 1)
    exchange(zero)
    for _ in range(ERROR_BEATS):  # its main thread may find it first
        zero.check(BEAT)
    with pytest.raises(Exit, match="1"):
        zero.check(BEAT)
    assert capfd.readouterr().err == "train: process 0: process 1 failed: no such shard\n"


def test_process_0_leaves_after_the_others_could_read_its_error(pair, clock) -> None:
    zero, one = pair
    start = clock.now
    one.explain(ValueError("x"))
    assert clock.now == start
    zero.explain(ValueError("x"))
    assert clock.now == start + 2 * BEAT


@pytest.mark.parametrize(
    "message", ["DataLoader timed out after 60 seconds", "worker (pid 7) is killed by signal: Killed"]
)
def test_a_lost_loader_may_be_started_again(pair, message: str) -> None:
    assert pair[1].explain(RuntimeError(message)) == (message, REQUEUE)


BROKEN = RuntimeError("gloo: Connection closed by peer")


def test_a_broken_collective_names_the_error_of_the_other(pair) -> None:
    zero, one = pair
    one.explain(ValueError("a fault of its own"))
    exchange(zero)
    assert zero.explain(BROKEN) == ("process 1 failed: a fault of its own", 1)


def test_a_broken_collective_names_the_process_that_died(pair, clock) -> None:
    zero, one = pair
    exchange(zero, one)
    line, code = zero.explain(BROKEN)
    assert code == REQUEUE
    assert line.splitlines()[0].startswith("process 1 on ") and line.splitlines()[0].endswith(" died")
    assert len(line.splitlines()) == 3  # and a table of both


def test_a_broken_collective_of_living_processes_says_so(pair, clock) -> None:
    zero, one = pair
    exchange(zero, one)
    heard = one.heartbeat()

    def sleep_and_hear(seconds: float) -> None:
        clock.now += seconds
        zero.peers.update(1, replace(heard, time=clock.now), clock.now)

    clock.sleep = sleep_and_hear
    line, code = zero.explain(BROKEN)
    assert (line.splitlines()[0], code) == (f"the processes lost each other, all are alive ({BROKEN})", REQUEUE)


def test_alone_an_error_is_its_own(clock) -> None:
    notes: Any = Notes()
    watchdog = Watchdog(World(0, 1, torch.device("cpu")), SECONDS, clock, lambda _: notes)
    assert watchdog.explain(BROKEN) == (str(BROKEN), 1)
    assert notes["alive/0"] == asdict(watchdog.heartbeat())
