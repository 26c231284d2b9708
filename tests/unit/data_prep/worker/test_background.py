"""The background thread: all messages in order, its error in the other thread, and an end in the middle."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from data_prep.worker.background import BackgroundThread


def test_all_messages_in_order() -> None:
    seen: list[int] = []
    thread = BackgroundThread(seen.extend, ahead=2)
    for number in range(50):
        thread.put(number)
    thread.close()
    thread.abandon()  # does nothing any more
    assert seen == list(range(50))


def test_its_error_is_raised_where_messages_are_put() -> None:
    def fail(messages: Iterator[int]) -> None:
        raise OSError(f"no room for {next(messages)}")

    def put_all() -> None:
        thread = BackgroundThread(fail, ahead=1)
        for number in range(100):  # far more than the queue holds: nobody waits for ever
            thread.put(number)
        thread.close()

    with pytest.raises(OSError, match="no room for 0"):
        put_all()


def test_abandoned_it_undoes_what_is_unfinished() -> None:
    said: list[str] = []
    begun = threading.Event()

    def work(messages: Iterator[int]) -> None:
        try:
            for _ in messages:
                begun.set()
            said.append("all done")
        finally:
            said.append("tidied")

    thread = BackgroundThread(work, ahead=4)
    thread.put(1)
    assert begun.wait(60)
    thread.abandon()
    thread.check()
    assert said == ["tidied"]
