"""Checkpoints that are whole or not there, readable by any number of processes.

    RUN/checkpoints/step_00001000/
        state.json                       position, counters, layout, and every file's size and SHA-256
        rank_00000-of-00002.safetensors  that process's slices: master, exp_avg, exp_avg_sq, ema of each group
    RUN/checkpoints/latest               the newest one's name

A checkpoint is written under another name, hashed, described by `state.json`, and renamed once all processes agree; only
then `latest` is replaced. Nothing is pickled. It holds fp32 slices alone (16 bytes a parameter with the average): the
bf16 weights are their rounding, and all random numbers follow from the seed and the position.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_prep.files import write_whole
from pretrain.config import CheckpointSection
from pretrain.data import Position
from pretrain.ema import Ema
from pretrain.engine import Engine, Slot, World

FOLDER, LATEST, STATE = "checkpoints", "latest", "state.json"
FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """What a run has done: `step` optimizer steps tried, of which AdamW applied `updates`."""

    step: int = 0
    updates: int = 0
    images: int = 0
    position: Position = field(default_factory=Position)


class Checkpoint:
    """A complete checkpoint on disk."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.state: dict[str, Any] = json.loads((path / STATE).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no complete checkpoint ({error}); remove it to use the one before") from error
        if self.state.get("format") != FORMAT:
            raise ValueError(f"{path} is of another version; this one reads format {FORMAT}")
        self._open: dict[str, Any] = {}

    @property
    def progress(self) -> Progress:
        p = self.state["progress"]
        return Progress(p["step"], p["updates"], p["images"], Position(**p["position"]))

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """Where every parameter lies, by name."""
        return {s["name"]: Slot(s["name"], tuple(s["shape"]), s["group"], s["offset"]) for s in self.state["layout"]}

    def verify(self, some: slice = slice(None)) -> None:
        """Compares files with their recorded size and SHA-256. Raises ValueError naming the damaged one."""
        for name, about in list(self.state["files"].items())[some]:
            path = self.path / name
            if not path.is_file() or path.stat().st_size != about["bytes"] or _sha256(path) != about["sha256"]:
                raise ValueError(
                    f"{path} is damaged: its size or hash is not the recorded one; remove {self.path} to use the one before"
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
        name = _file_name(rank, self.state["world"])
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        return self._open[name]


def newest(run_dir: Path) -> Checkpoint | None:
    """A run's newest complete checkpoint: the one that `latest` names. None where the run has none."""
    folder = run_dir / FOLDER
    complete = sorted(p for p in folder.glob("step_*") if (p / STATE).is_file())
    latest = folder / LATEST
    if not complete:
        if latest.exists():
            raise ValueError(f"{latest} names {latest.read_text().strip()}, but {folder} holds no complete checkpoint")
        return None
    named = folder / latest.read_text().strip() if latest.is_file() else complete[-1]
    return Checkpoint(named if named in complete else complete[-1])


def find_run(name: str) -> Path:
    """A run directory from its path or its name under runs/. Raises FileNotFoundError."""
    for path in (Path(name), Path("runs") / name):
        if (path / FOLDER).is_dir():
            return path
    raise FileNotFoundError(f"no run at {name} or runs/{name}: a run directory holds {FOLDER}/; train it first")


# ---- writing ----


def save(
    run_dir: Path, engine: Engine, ema: Ema, progress: Progress, about: dict[str, Any], keep: CheckpointSection
) -> Path:
    """Writes a checkpoint from all processes together and publishes it.

    Raises:
        RuntimeError: on all processes, naming what failed on which (a full disk, say); older checkpoints are untouched.
    """
    world, folder = engine.world, run_dir / FOLDER
    name = f"step_{progress.step:08d}"
    writing = folder / f".writing-{name}"
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".writing-*"):
            shutil.rmtree(leftover)
        writing.mkdir()
    _together(world)
    kinds = {"master": engine.masters, "ema": ema.shares, **engine.moments()}
    mine: dict[str, Any] = {"name": _file_name(world.rank, world.size)}
    try:
        tensors = {f"{k}.{g}": t.detach().contiguous() for k, shares in kinds.items() for g, t in enumerate(shares)}
        mine |= _write(writing / mine["name"], tensors)
    except (OSError, RuntimeError, ValueError) as error:  # safetensors raises its own kind, a ValueError's sibling
        mine["error"] = str(error)
    files = _gather(mine, world)
    if errors := [f"process {r}: {f['error']}" for r, f in enumerate(files) if "error" in f]:
        raise RuntimeError(f"{writing} could not be written: " + "; ".join(errors))
    if world.rank == 0:
        state = {
            "format": FORMAT,
            "progress": asdict(progress),
            "world": world.size,
            "layout": engine.layout,
            "layout_hash": engine.layout_hash,
            "shares": [m.numel() for m in engine.masters],
            **about,
            "files": {f["name"]: {"bytes": f["bytes"], "sha256": f["sha256"]} for f in files},
        }
        write_whole(writing / STATE, json.dumps(state) + "\n")
        _publish(writing, folder / name)
        _retain(folder, keep)
    _together(world)
    return folder / name


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _publish(writing: Path, path: Path) -> None:
    """Gives a complete folder its name, then points `latest` to it."""
    _sync_folder(writing)
    if path.exists():  # the same step, reached again after `latest` was lost
        shutil.rmtree(path)
    writing.rename(path)
    _sync_folder(path.parent)
    write_whole(path.parent / LATEST, path.name + "\n")


def _retain(folder: Path, keep: CheckpointSection) -> None:
    """Removes all but the last `keep_last` and every `keep_every`-th step's."""
    there = sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name))
    for path in there[: -keep.keep_last]:
        step = int(path.name.removeprefix("step_"))
        if not keep.keep_every or step % keep.keep_every:
            shutil.rmtree(path)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _file_name(rank: int, world: int) -> str:
    return f"rank_{rank:05d}-of-{world:05d}.safetensors"


def _together(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def _gather(item: Any, world: World) -> list[Any]:
    items: list[Any] = [None] * world.size
    if world.size > 1:
        dist.all_gather_object(items, item)
        return items
    return [item]


# ---- reading ----


def resume(checkpoint: Checkpoint, engine: Engine, ema: Ema, data: dict[str, Any]) -> Progress:
    """Puts a run's own checkpoint back, from any number of processes into any other.

    Args:
        data: the loader's fingerprint; the checkpoint's position is valid for the same one only.

    Raises:
        ValueError: damaged files, another model, or another data order.
    """
    world = engine.world
    problem = None
    try:
        checkpoint.verify(slice(world.rank, None, world.size))
    except ValueError as error:
        problem = str(error)
    if problems := [p for p in _gather(problem, world) if p]:
        raise ValueError(problems[0])
    if different := [k for k, v in data.items() if checkpoint.state["data"].get(k) != v]:
        lines = [f"  {k}: there {checkpoint.state['data'].get(k)}, now {data[k]}" for k in different]
        raise ValueError(
            f"{checkpoint.path} was made with another data order, so its position means other samples; undo the change, or "
            "start a new run with init_from:\n" + "\n".join(lines)
        )
    take_over(checkpoint, engine, ema, moments=True)
    return checkpoint.progress


def take_over(checkpoint: Checkpoint, engine: Engine, ema: Ema, moments: bool) -> None:
    """Takes weights and average, and if asked AdamW's moments, of a checkpoint of the same model."""
    here = {s.name: s.shape for s in engine.slots}
    there = {n: s.shape for n, s in checkpoint.slots.items()}
    if here != there:
        odd = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))
        lines = [f"  {n}: there {there.get(n)}, here {here.get(n)}" for n in odd[:10]]
        more = f"\n  and {len(odd) - 10} more" if len(odd) > 10 else ""
        raise ValueError(f"{checkpoint.path} is of another model:\n" + "\n".join(lines) + more)
    engine.fill(engine.masters, lambda name: checkpoint.parameter("master", name))
    engine.fill(ema.shares, lambda name: checkpoint.parameter("ema", name))
    if moments:
        for kind, shares in engine.moments().items():
            engine.fill(shares, lambda name, kind=kind: checkpoint.parameter(kind, name))  # type: ignore[misc]
        engine.updates = checkpoint.progress.updates
    engine.publish(engine.masters)
