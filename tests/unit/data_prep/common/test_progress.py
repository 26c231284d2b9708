"""Progress in a log: how often a line comes, and what it says."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_prep.common import progress
from data_prep.common.progress import Progress


class Clock:
    """A clock that a test sets by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    hand = Clock()
    monkeypatch.setattr(progress, "time", hand)
    return hand


def test_a_line_after_each_update(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "picture") as shown:
        for _ in range(2):
            clock.now += 2
            shown.update(3)
    assert capsys.readouterr().out.splitlines() == [
        "3 of 10 pictures, 1.5 pictures/s, about 0 min left",
        "6 of 10 pictures, 1.5 pictures/s, about 0 min left",
    ]


def test_a_line_at_most_every_so_many_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, "shard", line_seconds=30) as shown:
        for _ in range(65):
            clock.now += 1
            shown.update()
    assert [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "30 of 1000 shards",
        "60 of 1000 shards",
    ]


def test_what_was_done_before_does_not_count_for_the_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, "part", done=880) as shown:
        clock.now += 60
        shown.update(20)
    assert capsys.readouterr().out == "900 of 1000 parts, 0.3 parts/s, about 5 min left\n"


def test_items_that_take_minutes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(42, "cell", done=2) as shown:
        clock.now += 90
        shown.update()
    assert capsys.readouterr().out == "3 of 42 cells, 1.5 min each, about 58 min left\n"


def test_a_line_of_the_callers_own(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, "B", line=lambda: "half of it") as shown:
        shown.update()
        shown.say("a warning")
    assert capsys.readouterr().out.splitlines() == ["half of it", "a warning"]


def test_threads_lose_no_count(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2000, "shard") as shown, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: shown.update(), range(2000)))
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.partition(" ")[0]) for line in lines] == list(range(1, 2001))


def test_a_bar_on_a_terminal_and_no_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(4, "picture") as shown:
        shown.update(4)
        shown.note("well")
    said = capsys.readouterr()
    assert said.out == "" and "4/4" in said.err and "well" in said.err
