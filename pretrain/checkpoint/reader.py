"""Checkpoints on disk: their format, and how they are found, verified and read by any number of processes.

    RUN/checkpoints/step_00001000/
        state.json                       position, counters, layout, and every file's size and SHA-256
        rank_00000-of-00002.safetensors  that process's partitions: master, exp_avg, exp_avg_sq, ema of each group
    RUN/checkpoints/latest               the newest one's name

A checkpoint is complete or not there: `writer.py` writes it under another name first. Nothing is pickled. It holds fp32
partitions alone (16 bytes a parameter with the average): the bf16 weights are their rounding, and all random numbers follow
from the seed and the position.
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

from data_prep.common.files import atomic_write, sha256
from pretrain.config_files import flatten
from pretrain.distributed.partition import Slot
from pretrain.distributed.world import World, all_gather, barrier, broadcast
from pretrain.state import RunState

FOLDER, LATEST, STATE = "checkpoints", "latest", "state.json"
FORMAT = 2
MEND = "remove {} to use the one before"  # of each DamagedCheckpoint


class DamagedCheckpoint(ValueError):
    """The files of a checkpoint are not those that were written."""


class Checkpoint:
    """A complete checkpoint on disk; its tensors are read when they are asked for.

    Attributes:
        state: `state.json`.

    Raises:
        DamagedCheckpoint: `state.json` is missing or altered.
        ValueError: the checkpoint is of another format.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.state: dict[str, Any] = json.loads((path / STATE).read_text())
            intact = with_hash({k: v for k, v in self.state.items() if k != "sha256"}) == (path / STATE).read_text()
        except (OSError, ValueError, AttributeError) as error:
            raise DamagedCheckpoint(f"{path / STATE} cannot be read ({error}); {MEND.format(path)}") from error
        if self.state.get("format") != FORMAT and "sha256" not in self.state:
            raise ValueError(f"{path} is of another version; this one reads format {FORMAT}")
        if not intact:
            raise DamagedCheckpoint(f"{path / STATE} is damaged: it does not match its own hash; {MEND.format(path)}")
        self._open: dict[str, Any] = {}

    @property
    def run_state(self) -> RunState:
        """The run's counters and position."""
        return RunState.from_json(self.state["progress"])

    def pending_sums(self, world: World) -> list[float]:
        """This process's part of the monitor's sums; over all processes they add up to those that were saved by any number."""
        mine = self.state["totals"][world.rank :: world.size]
        return [sum(column) for column in zip(*mine, strict=True)]

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """The place of every parameter, by name."""
        return {s["name"]: Slot(s["name"], tuple(s["shape"]), s["group"], s["offset"]) for s in self.state["layout"]}

    def verify(self, files: slice = slice(None)) -> None:
        """Compares some of the files with their recorded size and SHA-256.

        Raises:
            DamagedCheckpoint: names the first damaged file.
        """
        for name, recorded in list(self.state["files"].items())[files]:
            path = self.path / name
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise DamagedCheckpoint(f"{path} is missing; {MEND.format(self.path)}")
            if size != recorded["bytes"]:
                found = f"{size} bytes, expected {recorded['bytes']}"
                raise DamagedCheckpoint(f"{path} is damaged: {found}; {MEND.format(self.path)}")
            if sha256(path) != recorded["sha256"]:
                raise DamagedCheckpoint(
                    f"{path} is damaged: its hash is not the recorded one; {MEND.format(self.path)}"
                )

    def parameter(self, kind: str, name: str) -> Tensor:
        """A whole parameter's fp32 values, in its shape, of a kind: master, exp_avg, exp_avg_sq, ema or another average."""
        slot = self.slots[name]
        size = self.state["shares"][slot.group]
        pieces = []
        for rank in slot.ranks(size):
            overlap = slot.overlap(rank, size)
            assert overlap is not None
            pieces.append(self._file(rank).get_slice(f"{kind}.{slot.group}")[overlap.in_partition])
        return torch.cat(pieces).reshape(slot.shape)

    def weights(self) -> list[str]:
        """The kinds that are weights: master, ema, and further averages, such as ema_0.999."""
        kinds = {key.rpartition(".")[0] for key in self._file(0).keys()}  # noqa: SIM118 - safe_open is no mapping
        return ["master", *sorted(kind for kind in kinds if kind.startswith("ema"))]

    def parameters(self, kind: str) -> dict[str, Tensor]:
        """The parameters that have this kind, by name: Muon's matrices have no exp_avg_sq."""
        shapes = {
            group: self._file(0).get_slice(f"{kind}.{group}").get_shape() for group in range(len(self.state["shares"]))
        }
        return {name: self.parameter(kind, name) for name, slot in self.slots.items() if shapes[slot.group] != [0]}

    def _file(self, rank: int) -> Any:
        name = file_name(rank, self.state["world"])
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        return self._open[name]


def newest(run_dir: Path) -> Checkpoint | None:
    """A run's newest complete checkpoint: the one that `latest` names. None where the run has none."""
    folder = run_dir / FOLDER
    complete = [p for p in newest_first(folder) if (p / STATE).is_file()]
    latest = folder / LATEST
    if not complete:
        if latest.exists():
            raise ValueError(f"{latest} names {latest.read_text().strip()}, but {folder} holds no complete checkpoint")
        return None
    named = folder / latest.read_text().strip() if latest.is_file() else complete[0]
    return Checkpoint(named if named in complete else complete[0])


def at_step(run_dir: Path, step: int) -> Checkpoint:
    """A run's complete checkpoint of a step. Raises ValueError where it is not there, with the steps that are."""
    folder = run_dir / FOLDER
    if not (folder / step_name(step) / STATE).is_file():
        there = ", ".join(map(str, steps(run_dir))) or "none"
        raise ValueError(f"{run_dir} has no checkpoint of step {step}; the steps of those that it has: {there}")
    return Checkpoint(folder / step_name(step))


def steps(run_dir: Path) -> list[int]:
    """The steps of a run's complete checkpoints, the first one first."""
    complete = (p.name for p in newest_first(run_dir / FOLDER) if (p / STATE).is_file())
    return sorted(int(name.removeprefix("step_")) for name in complete)


def step_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


def newest_first(folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, damaged ones too, the newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def find_run(name: str, holds: str = FOLDER) -> Path:
    """A run directory, which `holds` a file or folder, from its path or its name under runs/. Raises FileNotFoundError."""
    places = [Path(name)] if Path(name).is_absolute() else [Path(name), Path("runs") / name]
    for path in places:
        if (path / holds).exists():
            return path
    above = [run for path in places for run in list(path.parents)[:2] if path.exists() and (run / holds).exists()]
    mend = f"did you mean {above[0]}?" if above else "train it first"
    raise FileNotFoundError(f"no run at {' or '.join(map(str, places))}: a run directory holds {holds}; {mend}")


def with_hash(state: dict[str, Any]) -> str:
    """The text of `state.json`, which holds the SHA-256 of the rest of itself."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return json.dumps(state | {"sha256": digest}) + "\n"


def file_name(rank: int, world: int) -> str:
    """The name of the file that process `rank` of `world` writes."""
    return f"rank_{rank:05d}-of-{world:05d}.safetensors"


# ---- taking a checkpoint ----


def newest_intact(
    run_dir: Path, world: World, warn: Callable[[str], None], accept: Callable[[Checkpoint], bool] = lambda _: True
) -> Checkpoint | None:
    """Finds a run's newest checkpoint that is not damaged and that `accept` accepts. All processes call it.

    Each process verifies its part of the files.

    Args:
        warn: is given a line for each damaged checkpoint.

    Returns:
        None where the run has no checkpoint at all.

    Raises:
        ValueError: there are checkpoints, and every one is damaged or not accepted.
    """
    folder, lines = run_dir / FOLDER, []
    paths, started = broadcast((newest_first(folder), (folder / LATEST).exists()), world)
    for path in paths:
        problem, found = None, None
        try:
            found = Checkpoint(path)
            found.verify(slice(world.rank, None, world.size))
        except (DamagedCheckpoint, OSError) as error:
            problem = str(error)
        if problems := [p for p in all_gather(problem, world) if p]:
            lines.append(f"  {problems[0]}")
            warn(f"WARNING: {problems[0].partition('; remove')[0]}; taking the one before")
        elif found is not None and accept(found):
            return found
        else:
            lines.append(f"  {path} is from amid the skipped steps")
    if lines or started:
        raise ValueError(f"{folder}: no checkpoint can be used:\n" + "\n".join(lines))
    return None


def set_aside_later(run_dir: Path, step: int, world: World) -> None:
    """Renames the checkpoints of later steps to `aside_…`, so that retention and restarts ignore them; `latest` follows.

    Process 0 does it, while the others wait.
    """
    folder = run_dir / FOLDER
    if world.rank == 0:
        for path in newest_first(folder):
            if path.name > (name := step_name(step)):
                aside = folder / path.name.replace("step_", "aside_")
                shutil.rmtree(aside, ignore_errors=True)
                atomic_write(folder / LATEST, name + "\n")
                path.rename(aside)
    barrier(world)


def config_changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The differences between two runs' config and data, a line each: `section.key: old → new`.

    Args:
        before, after: hold `config` and `data`, as `state.json` does, and `deepspeed` where it is known.
    """
    old, new = (flatten({**state["config"], "data_set": state["data"]}) for state in (before, after))
    if "deepspeed" in before and "deepspeed" in after:  # checkpoints of earlier versions do not hold it
        old, new = (flat | flatten({"deepspeed": s["deepspeed"]}) for flat, s in ((old, before), (new, after)))
    expected = ("name", "run_dir", "init_from", "data_set.indexes", "data_set.draws")
    return [
        f"{key}: {old.get(key, 'not there')} → {new.get(key, 'not there')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(expected)
    ]
