"""Checkpoints that are whole or not there, readable by any number of processes.

    RUN/checkpoints/step_00001000/
        state.json                       position, counters, layout, and every file's size and SHA-256
        rank_00000-of-00002.safetensors  that process's slices: master, exp_avg, exp_avg_sq, ema of each group
    RUN/checkpoints/latest               the newest one's name

Here they are read; `saver.py` writes them, under another name first. Nothing is pickled. A checkpoint holds fp32 slices alone
(16 bytes a parameter with the average): the bf16 weights are their rounding, and all random numbers follow from the seed and
the position.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data_prep.common.files import atomic_write
from pretrain.distributed.engine import World, barrier, gather
from pretrain.state import RunState, Slot

FOLDER, LATEST, STATE = "checkpoints", "latest", "state.json"
FORMAT = 2
MEND = "remove {} to use the one before"


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not those that were written."""


class Checkpoint:
    """A complete checkpoint on disk.

    Raises:
        DamagedCheckpoint: `state.json` is missing or altered.
        ValueError: another version's.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.state: dict[str, Any] = json.loads((path / STATE).read_text())
            whole = sealed({k: v for k, v in self.state.items() if k != "sha256"}) == (path / STATE).read_text()
        except (OSError, ValueError, AttributeError) as error:
            raise DamagedCheckpoint(f"{path / STATE} cannot be read ({error}); {MEND.format(path)}") from error
        if self.state.get("format") != FORMAT and "sha256" not in self.state:
            raise ValueError(f"{path} is of another version; this one reads format {FORMAT}")
        if not whole:
            raise DamagedCheckpoint(f"{path / STATE} is damaged: it does not match its own hash; {MEND.format(path)}")
        self._open: dict[str, Any] = {}

    @property
    def progress(self) -> RunState:
        return RunState.from_json(self.state["progress"])

    def totals(self, world: World) -> list[float]:
        """The monitor's sums that this process goes on with: all processes' together, however many there were."""
        mine = self.state["totals"][world.rank :: world.size]
        return [sum(column) for column in zip(*mine, strict=True)]

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """Where every parameter lies, by name."""
        return {s["name"]: Slot(s["name"], tuple(s["shape"]), s["group"], s["offset"]) for s in self.state["layout"]}

    def verify(self, some: slice = slice(None)) -> None:
        """Compares files with their recorded size and SHA-256. Raises DamagedCheckpoint naming the damaged one."""
        for name, about in list(self.state["files"].items())[some]:
            path = self.path / name
            bytes_there = path.stat().st_size if path.is_file() else None
            if bytes_there is None:
                raise DamagedCheckpoint(f"{path} is missing; {MEND.format(self.path)}")
            if bytes_there != about["bytes"]:
                found = f"{bytes_there} bytes, expected {about['bytes']}"
                raise DamagedCheckpoint(f"{path} is damaged: {found}; {MEND.format(self.path)}")
            if sha256(path) != about["sha256"]:
                raise DamagedCheckpoint(
                    f"{path} is damaged: its hash is not the recorded one; {MEND.format(self.path)}"
                )

    def parameter(self, kind: str, name: str) -> Tensor:
        """A whole parameter's fp32 values of a kind (master, exp_avg, exp_avg_sq, ema), from the slices that hold it."""
        slot = self.slots[name]
        share = self.state["shares"][slot.group]
        first, last = slot.offset // share, (slot.offset + slot.numel - 1) // share
        pieces = []
        for rank in range(first, last + 1):
            low = max(slot.offset - rank * share, 0)
            high = min(slot.offset + slot.numel - rank * share, share)
            pieces.append(self._file(rank).get_slice(f"{kind}.{slot.group}")[low:high])
        return torch.cat(pieces).reshape(slot.shape)

    def parameters(self, kind: str) -> dict[str, Tensor]:
        """All parameters of a kind by name."""
        return {name: self.parameter(kind, name) for name in self.slots}

    def _file(self, rank: int) -> Any:
        name = file_name(rank, self.state["world"])
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        return self._open[name]


def newest(run_dir: Path) -> Checkpoint | None:
    """A run's newest complete checkpoint: the one that `latest` names. None where the run has none."""
    folder = run_dir / FOLDER
    complete = [p for p in by_age(folder) if (p / STATE).is_file()]
    latest = folder / LATEST
    if not complete:
        if latest.exists():
            raise ValueError(f"{latest} names {latest.read_text().strip()}, but {folder} holds no complete checkpoint")
        return None
    named = folder / latest.read_text().strip() if latest.is_file() else complete[0]
    return Checkpoint(named if named in complete else complete[0])


def by_age(folder: Path) -> list[Path]:
    """The folders of checkpoints, damaged ones too, the newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def find_run(name: str) -> Path:
    """A run directory from its path or its name under runs/. Raises FileNotFoundError."""
    for path in (Path(name), Path("runs") / name):
        if (path / FOLDER).is_dir():
            return path
    raise FileNotFoundError(f"no run at {name} or runs/{name}: a run directory holds {FOLDER}/; train it first")


def sealed(state: dict[str, Any]) -> str:
    """`state.json`'s text, with a hash of itself."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return json.dumps(state | {"sha256": digest}) + "\n"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def file_name(rank: int, world: int) -> str:
    return f"rank_{rank:05d}-of-{world:05d}.safetensors"


# ---- taking a checkpoint ----


def newest_whole(
    run_dir: Path, world: World, warn: Callable[[str], None], wanted: Callable[[Checkpoint], bool] = lambda _: True
) -> Checkpoint | None:
    """A run's newest checkpoint that is whole and wanted; damaged ones are told of. All processes call it.

    Each process verifies its part of the files. None where the run has no checkpoint at all.

    Raises:
        ValueError: there are checkpoints, and every one is damaged or unwanted.
    """
    folder, lines = run_dir / FOLDER, []
    paths, started = gather((by_age(folder), (folder / LATEST).exists()), world)[0]  # as process 0 sees them
    for path in paths:
        problem, found = None, None
        try:
            found = Checkpoint(path)
            found.verify(slice(world.rank, None, world.size))
        except (DamagedCheckpoint, OSError) as error:
            problem = str(error)
        if problems := [p for p in gather(problem, world) if p]:
            lines.append(f"  {problems[0]}")
            warn(f"WARNING: {problems[0].partition('; remove')[0]}; taking the one before")
        elif found is not None and wanted(found):
            return found
        else:
            lines.append(f"  {path} is from amid the skipped steps")
    if lines or started:
        raise ValueError(f"{folder}: no checkpoint can be used:\n" + "\n".join(lines))
    return None


def set_aside_later(run_dir: Path, step: int, world: World) -> None:
    """Renames checkpoints of later steps to `aside_…`, so that retention and restarts take none for the run's; `latest` follows.

    Process 0 does it, while the others wait.
    """
    folder = run_dir / FOLDER
    if world.rank == 0:
        for path in by_age(folder):
            if path.name > (name := f"step_{step:08d}"):
                aside = folder / path.name.replace("step_", "aside_")
                shutil.rmtree(aside, ignore_errors=True)
                atomic_write(folder / LATEST, name + "\n")
                path.rename(aside)
    barrier(world)


def changes(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two states' config and data, a line each: `section.key: old → new`."""
    old, new = (_flat({**state["config"], "data_set": state["data"]}) for state in (there, here))
    dull = ("name", "run_dir", "init_from", "data_set.indexes", "data_set.draws")
    return [
        f"{key}: {old.get(key, 'not there')} → {new.get(key, 'not there')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(dull)
    ]


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat
