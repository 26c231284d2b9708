"""One training in a run directory at a time: the second one is refused, and told who the first one is.

    RUN/.lock            locked by the kernel while the training lives: on this node, and on others if the file system can
    RUN/training.claim   who that is, rewritten regularly (data_prep/worker/claims.py), for file systems that do not

A training that is killed leaves the claim. The next one takes it over at once where the owner is known to be gone, and else
once it has not changed for a minute, as after the loss of a node.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from data_prep.common.files import lock
from data_prep.worker.claims import Claims, claim_path, read_claim, this_process
from pretrain.distributed.world import World, broadcast

FILE, NAME = ".lock", "training"
SECONDS = 60.0  # without a change after which a claim of a node that cannot be asked is dead


class RunLock:
    """The right to write into a run directory, which `acquire` makes if needed.

    Args:
        log: is given a line where the claim of another node is watched for `seconds`.
    """

    def __init__(self, run_dir: Path, world: World, log: Callable[[str], None], seconds: float = SECONDS):
        self.run_dir, self.world, self.log, self.seconds = run_dir, world, log, seconds
        self._made: list[Path] = []  # folders that are removed again if the start is refused
        self._file: IO[str] | None = None
        self._claims: Claims | None = None

    def acquire(self) -> None:
        """Takes the run directory on all processes; process 0 holds it.

        Raises:
            ValueError: on all processes: another training has it.
        """
        problem = None
        if self.world.rank == 0:
            try:
                problem = self._acquire()
            except OSError as error:
                problem = f"run_dir: {error}"
        if problem := broadcast(problem, self.world):
            self.release()
            raise ValueError(problem)

    def keep(self) -> None:
        """Notes that the start is accepted: from here on the folder stays."""
        self._made = []

    def require(self) -> None:
        """Raises RuntimeError where another training has taken the run directory over, as this one stood still."""
        if self._claims and not self._claims.owns(NAME):
            raise RuntimeError(f"{self.run_dir} was taken over by {owner(self.run_dir) or 'another training'}")

    def release(self) -> None:
        """Leaves the run directory; a folder that this start made is removed, unless the start was accepted."""
        if self._claims:
            self._claims.__exit__()
            self._claims = None
        if self._file:
            self._file.close()
            self._file = None
        if self._made:
            shutil.rmtree(self._made.pop(0), ignore_errors=True)
            for parent in self._made:
                try:
                    parent.rmdir()
                except OSError:  # somebody else's run is in it
                    break
            self._made = []

    def _acquire(self) -> str | None:
        """Takes the run directory; returns why it cannot be had."""
        missing = [p for p in (self.run_dir, *self.run_dir.parents) if not p.exists()]
        self.run_dir.mkdir(parents=True, exist_ok=True)
        file = (self.run_dir / FILE).open("a")
        try:
            locked = lock(file)
        except BlockingIOError:
            file.close()
            return self._in_use()
        self._file, self._made = file, missing
        claim = claim_path(self.run_dir, NAME)
        if locked and (other := _read(claim)) and other.get("boot") == this_process()["boot"]:
            claim.unlink(missing_ok=True)  # its owner would hold the lock
        self._claims = Claims(self.run_dir, self.seconds)
        told = False
        while not self._claims.claim(NAME):
            if not self._claims.open_names([NAME]):
                self._made = []
                return self._in_use()
            if not told:
                told = True
                self.log(f"{self.run_dir}: looking for {self.seconds:.0f} s whether {owner(self.run_dir)} is alive")
            time.sleep(self.seconds / 60)
        return None

    def _in_use(self) -> str:
        who = owner(self.run_dir) or "another training"
        return (
            f"run_dir: {self.run_dir} is in use by {who}; wait for its end, stop it, or give this one another run_dir"
        )


def owner(run_dir: Path) -> str | None:
    """The training that has a run directory, in words; None where there is none."""
    claim = _read(claim_path(run_dir, NAME))
    if claim is None:
        return None
    job = f", job {claim['slurm_job']}" if claim.get("slurm_job") else ""
    return (
        f"the training of {claim.get('host')} (process {claim.get('pid')}{job}), which started at {claim.get('since')}"
    )


def lock_problems(run_dir: Path) -> list[str]:
    """A problem where a training is in the run directory, as far as that shows at once: by the kernel's lock."""
    try:
        with (run_dir / FILE).open("r+") as file:
            lock(file)
    except BlockingIOError:
        return [f"run_dir: {run_dir} is in use by {owner(run_dir) or 'another training'}"]
    except OSError:  # it is not there, or may not be written, which is another check's problem
        return []
    return []


def _read(claim: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(read_claim(claim) or b"null")
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
