"""Requests to stop: real signals to this process, and a clock moved by hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from pretrain.resilience.signals import REPEAT_SECONDS, SIGNALS, StopRequest, reason


class HandClock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def stop(clock: HandClock, hangups: None) -> Iterator[StopRequest]:
    request = StopRequest(clock=clock)
    yield request
    request.close()


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes with which the process would have ended."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    return codes


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_with_its_number(stop: StopRequest, number: signal.Signals) -> None:
    assert stop.code == 0
    signal.raise_signal(number)
    assert stop.code == number
    assert reason(stop.code) == number.name


def test_the_same_signal_from_launcher_and_terminal_counts_once(stop, clock, exits) -> None:
    signal.raise_signal(signal.SIGTERM)
    clock.now += REPEAT_SECONDS
    signal.raise_signal(signal.SIGTERM)
    assert exits == []


def test_a_later_second_signal_ends_the_process(stop, clock, exits, capsys) -> None:
    signal.raise_signal(signal.SIGUSR1)
    clock.now += REPEAT_SECONDS + 0.001
    signal.raise_signal(signal.SIGTERM)
    assert exits == [128 + signal.SIGTERM]
    assert capsys.readouterr().err == "a second signal (SIGTERM): stopping at once\n"
    assert stop.code == signal.SIGUSR1


def test_the_time_limit_is_in_hours(clock) -> None:
    request = StopRequest(1.5, clock=clock)
    try:
        clock.now += 1.5 * 3600
        assert request.code == 0
        clock.now += 1
        assert request.code == -1
        assert reason(request.code) == "the time limit (checkpoint.time_limit)"
        signal.raise_signal(signal.SIGUSR1)
        assert request.code == signal.SIGUSR1
    finally:
        request.close()


def test_a_launcher_that_is_gone_asks_to_stop(clock) -> None:
    """Nobody else would end the processes that it leaves behind."""
    launcher = SimpleNamespace(gone=False)
    request = StopRequest(launcher=launcher, clock=clock)  # type: ignore[arg-type]
    try:
        assert request.code == 0
        launcher.gone = True
        assert reason(request.code) == "the end of its launcher"
    finally:
        request.close()


def test_nohup_keeps_a_training_going(clock) -> None:
    """Without it, a terminal that is closed asks for a checkpoint; with it, SIGHUP stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = StopRequest(clock=clock)
        signal.raise_signal(signal.SIGHUP)
        assert request.code == 0
        request.close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_closing_restores_the_handlers(clock) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    request = StopRequest(clock=clock)
    assert [signal.getsignal(number) for number in SIGNALS] != before
    request.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_child_process_takes_no_request(stop) -> None:
    """A loader's process has the handler too, as it is forked; its parent ends it."""
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(int(stop.code))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
