"""Pool of child processes that decode pictures, with limits of time and memory: a hostile file fails alone.

Each child has a thread that writes a task to its stdin and waits for the answer on its stdout. A child that exceeds the time
is ended by its own alarm, even inside of libjpeg and when no thread waits for it; one that exceeds the memory gets a
MemoryError; a task at which a child dies twice has crashed it. Each of these is an `Unusable` of that one task, and the
thread goes on with a new child. A child whose parent is gone reads the end of its stdin and exits.

The child runs this file as a program: it imports no torch, and not the parent's main module as multiprocessing would. A
message is a pickle and the arrays that it refers to: their number, their lengths, their bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from data_prep.pictures.images import Unusable

Result = TypeVar("Result")
PIPE_BYTES = 1 << 20  # the most that an unprivileged process may ask for


class DecoderPool:
    """Pool of `processes` children; each task may take `seconds` of computing and `memory_bytes` of address space."""

    def __init__(self, processes: int, seconds: float = 30.0, memory_bytes: int = 4 << 30):
        self._seconds, self._memory_bytes = seconds, memory_bytes
        self._threads = ThreadPoolExecutor(processes, "decoder")
        self._own = threading.local()  # .child: the child of a thread
        self._children: set[subprocess.Popen[bytes]] = set()
        self._closed = False
        self._lock = threading.Lock()  # no child is started once the pool is closed

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Returns the future of function(*args); a child must be able to import the function.

        The future raises what the function raises, and `Unusable`: too_slow, too_much_memory, decoder_crashed;
        RuntimeError where no child can be started; CancelledError where the pool was closed.
        """
        assert function.__module__ != "__main__", f"{function.__name__}: a child has another main module"
        return self._threads.submit(self._run, function, args)

    def close(self) -> None:
        """Kills all children; tasks that are not done are cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True
            for child in self._children:
                child.kill()
        self._threads.shutdown()
        for child in self._children:
            child.communicate()  # no zombie, no open pipe

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, function: Callable[..., Result], args: tuple[Any, ...]) -> Result:
        for may_repeat in (True, False):
            child = getattr(self._own, "child", None)
            if child is None or child.poll() is not None:
                child = self._own.child = self._start()
            try:
                _write(child.stdin, _pack((function, args)))
                done, answer = _unpack(_read(child.stdout))
                break
            except (EOFError, BrokenPipeError):
                self._reap(child)
                if (code := child.returncode) == -signal.SIGPROF:
                    raise Unusable("too_slow", f"more than {self._seconds:g} s of computing") from None
                if not may_repeat:  # the first time the kernel may have killed it, short of memory
                    raise Unusable("decoder_crashed", f"signal {-code}" if code < 0 else f"exit code {code}") from None
        if not done:
            raise answer
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        """Starts a child and waits until it has imported all it needs, so that this counts for no task."""
        with self._lock:
            if self._closed:
                raise CancelledError
            stderr = os.dup(2)  # used by the child once it is ready; what it prints before that is read here
            child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "data_prep.pictures.decoders",
                    *map(str, (self._seconds, self._memory_bytes, stderr)),
                ],
                cwd=Path(__file__).resolve().parents[2],
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # threads reserve address space
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[stderr],
            )
            os.close(stderr)
            self._children.add(child)
        assert child.stdin and child.stdout and child.stderr
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):  # above the user's limit for all pipes: only slower
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            _read(child.stdout)
        except EOFError:
            words = self._reap(child).decode(errors="replace").split("\n")
            why = next((line for line in reversed(words) if line.strip()), f"exit code {child.returncode}")
            raise RuntimeError(f"a decoding process does not start: {why}") from None
        child.stderr.close()
        return child

    def _reap(self, child: subprocess.Popen[bytes]) -> bytes:
        """Waits for a child that has died and closes its pipes; returns its last output on stderr."""
        _, words = child.communicate()
        with self._lock:
            if self._closed:
                raise CancelledError
            self._children.discard(child)
        return words


def _pack(value: object) -> list[Any]:
    arrays: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    return [body, *(array.raw() for array in arrays)]


def _unpack(parts: list[bytearray]) -> Any:
    return pickle.loads(parts[0], buffers=parts[1:])


def _write(pipe: Any, parts: list[Any]) -> None:
    pipe.write(struct.pack(f"<{len(parts) + 1}Q", len(parts), *map(len, parts)))
    pipe.writelines(parts)
    pipe.flush()


def _read(pipe: Any) -> list[bytearray]:
    """Reads a message. Raises EOFError where the other side is gone."""

    def exactly(size: int) -> bytearray:
        found = bytearray(size)
        if pipe.readinto(found) < size:
            raise EOFError
        return found

    (count,) = struct.unpack("<Q", exactly(8))
    return [exactly(size) for size in struct.unpack(f"<{count}Q", exactly(8 * count))]


def main(seconds: float, memory_bytes: int, stderr: int) -> None:
    """Runs the child: answers tasks from stdin until that ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a job; the parent ends its children
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGPROF, signal.SIGPIPE):  # the time limit; the parent is gone
        signal.signal(number, signal.SIG_DFL)
    os.nice(5)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes if most < 0 else min(memory_bytes, most), most))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(stderr, 1)  # so that no print gets into a message
    _write(answers, _pack("ready"))
    os.dup2(stderr, 2)
    with contextlib.suppress(EOFError):
        while True:
            task = _read(sys.stdin.buffer)
            signal.setitimer(signal.ITIMER_PROF, seconds)  # processor time: the machine may be suspended or busy
            answer = _answer(task, memory_bytes)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _write(answers, answer)


def _answer(task: list[bytearray], memory_bytes: int) -> list[Any]:
    try:
        function, args = _unpack(task)
        return _pack((True, function(*args)))
    except MemoryError:
        return _pack((False, Unusable("too_much_memory", f"more than {memory_bytes / 2**30:g} GiB")))
    except Exception as error:  # raised in the parent
        return _pack((False, error))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
