"""Claims on tasks by workers on any number of nodes: files in a shared folder, without a server.

    with Claims(folder) as claims:
        for name in claims.take(names, done):  # tasks that are neither done nor held by a living worker
            work_on(name)

A claim is a file that names its owner. The owner rewrites it regularly: its heartbeat. A killed worker leaves its claims, and
others take them over: at once where its process is known to be gone (same boot, same PID namespace), else after they were
unchanged for the timeout. Other nodes' clocks and modification times are not trusted. Time is counted in this worker's own
heartbeats, which stop while it is suspended: workers that are suspended and resumed together do not take each other for dead.

In rare races (an owner stopped between reading and writing, a file system that answers late) two workers may hold one name.
This does no harm where the result is the same bytes from any worker, as for a part.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_prep.common.files import atomic_write, temporary_name

SUFFIX = ".claim"
BEATS = 6  # heartbeats in a timeout
POLL_SECONDS = 1.0  # between two checks of other workers' claims


@dataclass(frozen=True)
class SeenClaim:
    """Another worker's claim: its content, the own beat at which that was first seen, and whether it ever changed."""

    content: bytes
    since: int
    changed: bool


class Claims:
    """This worker's claims, kept alive by a thread, and what it has seen of the others'. Not for several calling threads."""

    def __init__(self, folder: Path, timeout: float = 60.0):
        """`timeout`: seconds without a heartbeat after which a worker counts as dead; the same for all workers."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.timeout = folder, timeout
        self._token = secrets.token_hex(16)
        self._owner = {"token": self._token, **this_process()}
        self._held: set[str] = set()
        self._seen: dict[str, SeenClaim] = {}
        self._beats = 0
        self._writing = threading.Lock()  # else a heartbeat could restore a claim that is being released
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
        """Claims names one by one and yields each for this worker to work on.

        Args:
            names: tasks in the order in which they are tried.
            done: returns the names that are done, by any worker.
            prefix: stands before a name in its claim.
            keep: the caller releases the claims; else each is released when the next name is asked for.
            wait: end only when all names are done; else as soon as all are done or held by living workers.
            stop: ends the iteration once it is set.
        """
        taken: set[str] = set()
        stop = stop or threading.Event()
        while not stop.is_set():
            finished = done()
            left = [name for name in names if name not in taken and name not in finished]
            open_ = self.open_names([prefix + name for name in left])
            if not left or not (open_ or wait):
                return
            claimed = next((name for name in open_ if self.claim(name)), None)
            if claimed is None:
                stop.wait(POLL_SECONDS)
                continue
            name = claimed.removeprefix(prefix)
            if name not in done():  # else its last owner has just finished it
                taken.add(name)
                yield name
                if keep:
                    continue
            self.release(claimed)

    def claim(self, name: str) -> bool:
        """Claims `name`; returns whether this worker now owns it. Raises OSError where the folder cannot be written."""
        if not self._create(name):
            seen = self._see(name)
            if seen is None:
                return False  # it has just been removed: the caller tries again
            if not self._is_own(seen.content) and not (self._is_dead(seen) and self._take_over(name, seen.content)):
                return False
        self._held.add(name)
        self._seen.pop(name, None)
        return True

    def owns(self, name: str) -> bool:
        """Returns whether `name` is still this worker's, and was not taken over while it stood still."""
        return self._is_own(read_claim(self._path(name)) or b"")

    def release(self, name: str) -> None:
        """Removes the claim on `name`, unless another worker has taken it over."""
        with self._writing:
            self._held.discard(name)
            if self.owns(name):
                self._path(name).unlink(missing_ok=True)

    def open_names(self, names: Iterable[str]) -> list[str]:
        """Returns the names without a claim, or whose owner is dead or has not been seen alive yet."""
        known = claimed_names(self.folder) | self._seen.keys() | self._held  # NFS may list a new claim late
        return [name for name in names if name not in known or not self._is_alive(name)]

    def others(self) -> list[str]:
        """Returns the names claimed by other workers that are not known to be dead."""
        seen = {name: self._see(name) for name in sorted(claimed_names(self.folder))}
        return [n for n, s in seen.items() if s and not self._is_own(s.content) and not self._is_dead(s)]

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)

    def _path(self, name: str) -> Path:
        return claim_path(self.folder, name)

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "beat": self._beats}).encode()

    def _create(self, name: str) -> bool:
        """Writes a claim unless there is one; returns whether it did."""
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
        """Replaces a dead claim. Of several workers that try, one moves it away and one creates the new claim."""
        path = self._path(name)
        if read_claim(path) != dead:  # it may have changed since it was judged dead
            return False
        aside = path.with_name(temporary_name(path.name))
        try:
            path.rename(aside)
        except FileNotFoundError:
            return False
        if read_claim(aside) != dead:  # another worker's new claim: it is put back
            aside.rename(path)
            return False
        aside.unlink()
        return self._create(name)

    def _heartbeat(self) -> None:
        while not self._stop.wait(self.timeout / BEATS):
            self._beats += 1
            for name in list(self._held):
                # A full disk or an error of NFS: the claim stays held, and the next heartbeat tries again.
                with self._writing, suppress(OSError):
                    if name in self._held and self.owns(name):
                        atomic_write(self._path(name), self._content())

    def _see(self, name: str) -> SeenClaim | None:
        """Reads another worker's claim, and remembers when its content changed."""
        content, known = read_claim(self._path(name)), self._seen.get(name)
        if content is None:
            self._seen.pop(name, None)
            return None
        if known is None or known.content != content:
            known = self._seen[name] = SeenClaim(content, self._beats, changed=known is not None)
        return known

    def _is_own(self, content: bytes) -> bool:
        return self._token.encode() in content

    def _is_dead(self, seen: SeenClaim) -> bool:
        # One beat more than in a timeout: the first one may have come right after the claim was seen.
        return owner_is_gone(seen.content, self._owner) or self._beats - seen.since > BEATS

    def _is_alive(self, name: str) -> bool:
        seen = self._see(name)
        return seen is not None and (self._is_own(seen.content) or (seen.changed and not self._is_dead(seen)))


def claim_path(folder: Path, name: str) -> Path:
    """Returns the file of the claim on a name, whatever letters that has."""
    return folder / (name.replace("%", "%25").replace("/", "%2F") + SUFFIX)


def claimed_names(folder: Path) -> set[str]:
    """Returns all names with a claim of any worker."""
    files = [file.removesuffix(SUFFIX) for file in os.listdir(folder) if file.endswith(SUFFIX)]
    return {file.replace("%2F", "/").replace("%25", "%") for file in files}


def remove_claims(folder: Path, done: Collection[str]) -> None:
    """Removes the claims on names that are done: left by killed workers, or about to be released by living ones."""
    for name in claimed_names(folder).intersection(done):
        claim_path(folder, name).unlink(missing_ok=True)


def read_claim(path: Path) -> bytes | None:
    """Reads a claim's content; None where there is no claim."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return secrets.token_bytes(8)  # NFS: it was replaced while it was read, and so has changed


def this_process() -> dict[str, object]:
    """Returns what identifies this process among those of all nodes, and helps people to find it."""
    namespace, boot = os.stat("/proc/self/ns/pid").st_ino, Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    about = {"host": socket.gethostname(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
    about["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
    return {**about, "boot": boot, "pid_namespace": namespace, "pid": os.getpid(), "start": process_state("self")[1]}


def process_state(pid: int | str) -> tuple[str, int]:
    """Returns a process's state (a letter) and start time, fields 3 and 22 of its stat; the name before may hold anything."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])


def owner_is_gone(content: bytes, here: dict[str, object]) -> bool:
    """Returns whether a claim's owner is known to be gone; `here` is this process. False where it cannot be known."""
    try:
        owner = json.loads(content)
        if (owner["boot"], owner["pid_namespace"]) != (here["boot"], here["pid_namespace"]):
            return False
    except (ValueError, TypeError, KeyError):  # not written by a worker, or only in part
        return False
    try:
        os.kill(owner["pid"], 0)  # finds processes that /proc hides (hidepid), too
        if os.readlink("/proc/self") != str(here["pid"]):  # /proc shows another namespace
            return False
        state, started = process_state(owner["pid"])
    except ProcessLookupError:
        return True
    except OSError:  # another user's, or hidden
        return False
    return state in "ZX" or started != owner["start"]
