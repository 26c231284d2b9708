"""Background thread that works through a queue of messages, and hands its error to the thread that fills the queue."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Queue
from typing import Any


class BackgroundThread:
    """A thread that works through messages; its error is raised at the next `put`, or by `close`."""

    def __init__(self, work: Callable[[Iterator[Any]], None], ahead: int):
        """Starts `work` with an iterator over the messages, of which at most `ahead` wait."""
        self._queue: Queue[Any] = Queue(ahead)
        self._error: BaseException | None = None
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work,), name="writer", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises the thread's error, if it had one."""
        if self._error is not None:
            raise self._error

    def put(self, message: Any) -> None:
        """Adds a message; waits while the queue is full. Raises the thread's error."""
        self.check()
        self._queue.put(message)

    def close(self) -> None:
        """Waits until all messages are worked through. Raises the thread's error."""
        self._queue.put(None)
        self._thread.join()
        self.check()

    def abandon(self) -> None:
        """Ends the thread without the messages that are left; does nothing after `close`."""
        self._abandoned.set()
        while self._thread.is_alive():
            empty(self._queue)
            self._queue.put(None)
            self._thread.join(0.05)

    def _run(self, work: Callable[[Iterator[Any]], None]) -> None:
        try:
            work(self._messages())
        except _Abandoned:
            pass
        except BaseException as error:  # raised in the thread that fills the queue
            self._error = error
            for _ in iter(self._queue.get, None):  # else that thread would wait for room
                pass

    def _messages(self) -> Iterator[Any]:
        while (message := self._queue.get()) is not None:
            yield message
        if self._abandoned.is_set():
            raise _Abandoned


class _Abandoned(Exception):
    """Raised in the thread's work when it is abandoned, so that it undoes what is unfinished."""


def empty(queue: Queue[Any]) -> None:
    """Takes everything out of a queue."""
    while not queue.empty():
        queue.get_nowait()
