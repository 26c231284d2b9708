"""Who does what, agreed by workers on any number of nodes through one shared folder, without a server.

    with Claims(folder) as claims:
        for name in claims.take(names, done):  # what is not done, and not known to be in living hands
            do(name)

A claim is a file that names its owner, who rewrites it again and again: its heartbeat. A killed worker leaves its claims,
and others take them over: at once where its process is seen to be gone (same boot, same PID namespace), else once they
stood unchanged for the timeout. No other node's clock is trusted, nor modification times. Time is counted in this worker's
own beats, and so stands still while it does: workers that are suspended and resumed together do not call each other dead.

In rare races (an owner stopped between looking and writing, a file system that answers late) two workers may hold one
name. It does no harm where the work is published idempotently and byte for byte the same by whomever, as a part is.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_prep.common.files import atomic_write, temporary_name

SUFFIX = ".claim"
BEATS = 6  # in a timeout
POLL_SECONDS = 1.0  # between two looks at claims that may be dead


@dataclass(frozen=True)
class Sighting:
    """Another's claim as this worker knows it: its content, since which of our beats, and whether it ever changed."""

    content: bytes
    since: int
    changed: bool


class Claims:
    """This worker's claims, kept alive by a thread, and its view of the others'. For one calling thread."""

    def __init__(self, folder: Path, timeout: float = 60.0):
        """`timeout`: seconds without a heartbeat after which a worker counts as dead; the same for all workers."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.timeout = folder, timeout
        self._token = secrets.token_hex(16)
        self._owner = {"token": self._token, **this_process()}
        self._held: set[str] = set()
        self._seen: dict[str, Sighting] = {}
        self._beats = 0
        self._writing = threading.Lock()  # else a beat could bring back what is being released
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True)
        self._thread.start()

    def take(
        self,
        names: Sequence[str],
        done: Callable[[], Collection[str]],
        prefix: str = "",
        *,
        keep: bool = False,
        wait: bool = False,
        stop: threading.Event | None = None,
    ) -> Iterator[str]:
        """Those of `names` that this worker is to do, one by one and each once; `done` tells those that are done.

        Ends when all are done or in living hands; with `wait`, when all are done, whoever does them. Each is claimed as
        `prefix` + name, and released when the next is asked for, unless the caller does (`keep`).
        """
        taken: set[str] = set()
        stop = stop or threading.Event()
        while not stop.is_set():
            ready = done()
            left = [name for name in names if name not in taken and name not in ready]
            open_ = self.undecided([prefix + name for name in left])
            if not left or not (open_ or wait):
                return
            mine = next((name for name in open_ if self.claim(name)), None)
            if mine is None:
                stop.wait(POLL_SECONDS)
                continue
            name = mine.removeprefix(prefix)
            if name not in done():  # else its last owner finished it just now
                taken.add(name)
                yield name
                if keep:
                    continue
            self.release(mine)

    def claim(self, name: str) -> bool:
        """Whether this worker now owns `name`. Raises OSError where the folder cannot be written."""
        if not self._create(name):
            seen = self._look(name)
            if seen is None:
                return False  # it went just now: ask again
            if not self._is_own(seen.content) and not (self._is_dead(seen) and self._take_over(name, seen.content)):
                return False
        self._held.add(name)
        self._seen.pop(name, None)
        return True

    def still_mine(self, name: str) -> bool:
        """Whether `name` is still this worker's: not after it was stopped for so long that another took over."""
        return self._is_own(read(self._path(name)) or b"")

    def release(self, name: str) -> None:
        """Gives `name` up. Nothing happens to a claim that is another's by now."""
        with self._writing:
            self._held.discard(name)
            if self.still_mine(name):
                self._path(name).unlink(missing_ok=True)

    def undecided(self, names: Iterable[str]) -> list[str]:
        """Those of `names` to claim or to wait for: without a claim, or with one that is dead or was never seen to beat."""
        there = claimed(self.folder) | self._seen.keys() | self._held  # NFS may list a new claim late
        return [name for name in names if name not in there or not self._is_alive(name)]

    def others(self) -> list[str]:
        """The names claimed by other workers that are not known to be dead."""
        seen = {name: self._look(name) for name in sorted(claimed(self.folder))}
        return [n for n, s in seen.items() if s and not self._is_own(s.content) and not self._is_dead(s)]

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)

    def _path(self, name: str) -> Path:
        return path_of(self.folder, name)

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "beat": self._beats}).encode()

    def _create(self, name: str) -> bool:
        """Makes a claim unless there is one."""
        path = self._path(name)
        try:
            file = path.open("xb")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self._content())
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return True

    def _take_over(self, name: str, dead: bytes) -> bool:
        """Puts an own claim in the place of a dead one. Of several who try, one moves it away, and one creates anew."""
        path = self._path(name)
        if read(path) != dead:  # looked at once more, as judging took a while
            return False
        aside = path.with_name(temporary_name(path.name))
        try:
            path.rename(aside)
        except FileNotFoundError:
            return False
        if read(aside) != dead:  # another's new claim, made this very moment: back with it
            aside.rename(path)
            return False
        aside.unlink()
        return self._create(name)

    def _heartbeat(self) -> None:
        while not self._stop.wait(self.timeout / BEATS):
            self._beats += 1
            for name in list(self._held):
                # A full disk or a hiccup of NFS: the claim stays held, and the next beat tries again.
                with self._writing, suppress(OSError):
                    if name in self._held and self.still_mine(name):
                        atomic_write(self._path(name), self._content())

    def _look(self, name: str) -> Sighting | None:
        content, known = read(self._path(name)), self._seen.get(name)
        if content is None:
            self._seen.pop(name, None)
            return None
        if known is None or known.content != content:
            known = self._seen[name] = Sighting(content, self._beats, changed=known is not None)
        return known

    def _is_own(self, content: bytes) -> bool:
        return self._token.encode() in content

    def _is_dead(self, seen: Sighting) -> bool:
        # One beat more than a timeout holds: the first one may have followed the sighting at once.
        return is_gone(seen.content, self._owner) or self._beats - seen.since > BEATS

    def _is_alive(self, name: str) -> bool:
        seen = self._look(name)
        return seen is not None and (self._is_own(seen.content) or (seen.changed and not self._is_dead(seen)))


def path_of(folder: Path, name: str) -> Path:
    return folder / (name.replace("%", "%25").replace("/", "%2F") + SUFFIX)


def claimed(folder: Path) -> set[str]:
    """All names with a claim, whoever's."""
    files = [file.removesuffix(SUFFIX) for file in os.listdir(folder) if file.endswith(SUFFIX)]
    return {file.replace("%2F", "/").replace("%25", "%") for file in files}


def clear(folder: Path, done: Collection[str]) -> None:
    """Removes the claims on work that is done: of killed workers, as living ones have only to give them up."""
    for name in claimed(folder).intersection(done):
        path_of(folder, name).unlink(missing_ok=True)


def read(path: Path) -> bytes | None:
    """A claim's content, whatever it is; None where there is no claim."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return secrets.token_bytes(8)  # NFS: replaced while it was read, that is, changed


def this_process() -> dict[str, object]:
    """What tells this process from every other one, on any node, and a reader where to find it."""
    namespace, boot = os.stat("/proc/self/ns/pid").st_ino, Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    about = {"host": socket.gethostname(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
    return {**about, "boot": boot, "pid_namespace": namespace, "pid": os.getpid(), "start": process_state("self")[1]}


def process_state(pid: int | str) -> tuple[str, int]:
    """A process's state (a letter) and start time (field 22 of its stat; the name before them may hold anything)."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])


def is_gone(content: bytes, here: dict[str, object]) -> bool:
    """Whether a claim's owner can be seen from `here` to be gone; False where that cannot be told."""
    try:
        owner = json.loads(content)
        if (owner["boot"], owner["pid_namespace"]) != (here["boot"], here["pid_namespace"]):
            return False
    except (ValueError, TypeError, KeyError):  # not written by a worker, or not to its end
        return False
    try:
        os.kill(owner["pid"], 0)  # tells also of processes that /proc hides (hidepid)
        if os.readlink("/proc/self") != str(here["pid"]):  # /proc shows another namespace
            return False
        state, started = process_state(owner["pid"])
    except ProcessLookupError:
        return True
    except OSError:  # another user's, or hidden
        return False
    return state in "ZX" or started != owner["start"]
