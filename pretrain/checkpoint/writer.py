"""Writing checkpoints, while training goes on if asked.

Each process writes its slices into a folder of another name, hashes them and tells process 0 on a board; process 0 describes
the folder by `state.json`, renames it, and only then replaces `latest`. All of that happens in threads, without a collective.
What fails (a full disk, say) leaves the older checkpoints whole, and training goes on.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_prep.common.files import atomic_write
from pretrain.checkpoint.reader import FOLDER, FORMAT, LATEST, STATE, file_name, sealed, sha256
from pretrain.config import Config
from pretrain.distributed.ema import Ema
from pretrain.distributed.engine import Engine, barrier
from pretrain.distributed.store import DistError, KeyValueStore
from pretrain.state import RunState

# Seconds that process 0 waits for the others' files, which are written at the same time as its own.
PATIENCE = 1800.0


class Saver:
    """Writes the checkpoints of a run. All processes call `save` and `wait` at the same steps.

    Attributes:
        error: why the last checkpoint could not be written; None where it could, or is not ready yet.
    """

    def __init__(self, config: Config, engine: Engine, ema: Ema, about: dict[str, Any]):
        self.folder, self.keep = config.run_dir / FOLDER, config.checkpoint
        self.engine, self.ema, self.about = engine, ema, about
        self.error: str | None = None
        self._board = KeyValueStore(PATIENCE)
        self._thread: threading.Thread | None = None
        self._copies: dict[str, Tensor] = {}
        self._count, self._name = 0, cast(str | None, None)

    def save(self, progress: RunState, totals: list[float]) -> None:
        """Starts to write a checkpoint, once the one before is finished; `totals` are the monitor's sums of this process.

        Without `checkpoint.background` it is finished, or has failed, when this returns.
        """
        self.wait()
        self.error, self._name = None, step_name(progress.step)
        self._count += 1
        if self.engine.world.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.glob(".writing-*"):
                    shutil.rmtree(leftover)
                self._writing(progress).mkdir()
            except OSError as error:
                self.error = str(error)
        barrier(self.engine.world)
        tensors = self._tensors(copied=self.keep.background)
        self._thread = threading.Thread(target=self._write, args=(progress, totals, tensors), daemon=True)
        self._thread.start()
        if not self.keep.background:
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint that is being written is published, or has failed, for all processes."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def news(self) -> str | None:
        """What became of the last checkpoint, once."""
        if self._name is None or (self._thread is not None and self._thread.is_alive()):
            return None
        name, self._name = self._name, None
        if self.error:
            return f"WARNING: {self.error}; training goes on, the checkpoints before are whole"
        return f"checkpoint {self.folder / name}"

    def _writing(self, progress: RunState) -> Path:
        return self.folder / f".writing-{step_name(progress.step)}"

    def _tensors(self, copied: bool) -> dict[str, Tensor]:
        """This process's slices, copied into host memory that is kept for the next time (pinned for GPUs: at most doubled)."""
        kinds = {"master": self.engine.masters, "ema": self.ema.shares, **self.engine.moments()}
        tensors = {f"{k}.{g}": t.detach() for k, shares in kinds.items() for g, t in enumerate(shares)}
        if not copied:
            return {name: t.contiguous() for name, t in tensors.items()}
        for name, t in tensors.items():
            if name not in self._copies:
                self._copies[name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            self._copies[name].copy_(t, non_blocking=True)
        if self.engine.world.device.type == "cuda":
            torch.cuda.synchronize()
        return self._copies

    # ---- in the thread ----

    def _write(self, progress: RunState, totals: list[float], tensors: dict[str, Tensor]) -> None:
        world, writing = self.engine.world, self._writing(progress)
        mine: dict[str, Any] = {"name": file_name(world.rank, world.size), "totals": totals}
        try:
            if self.error:
                raise OSError(self.error)
            mine |= _write_file(writing / mine["name"], tensors)
        except Exception as error:  # whatever it is, the other processes wait to hear of it
            mine["error"] = str(error)
        try:
            self._board.post(f"saved/{self._count}/{world.rank}", mine)
            if world.rank == 0:
                self._board.post(f"saved/{self._count}", self._finish(progress, writing))
            self.error = self._board.read([f"saved/{self._count}"])[0]
        except DistError as error:
            self.error = f"{writing}: not all processes wrote their part within {PATIENCE / 60:.0f} minutes ({error})"
        except Exception as error:
            self.error = f"{writing}: {error!r}"

    def _finish(self, progress: RunState, writing: Path) -> str | None:
        """Process 0: publishes what all wrote, or removes it and returns why."""
        ranks = range(self.engine.world.size)
        files = self._board.read([f"saved/{self._count}/{rank}" for rank in ranks])
        problems = [f"process {rank}: {f['error']}" for rank, f in zip(ranks, files, strict=True) if "error" in f]
        if not problems:
            state = {
                "format": FORMAT,
                "progress": progress.to_json(),
                "totals": [f["totals"] for f in files],
                "world": len(ranks),
                "layout": self.engine.layout,
                "layout_hash": self.engine.layout_hash,
                "shares": [m.numel() for m in self.engine.masters],
                **self.about,
                "files": {f["name"]: {"bytes": f["bytes"], "sha256": f["sha256"]} for f in files},
            }
            try:
                atomic_write(writing / STATE, sealed(state))
                publish(writing, self.folder / step_name(progress.step))
            except OSError as error:
                problems = [f"process 0: {error}"]
            else:
                try:
                    retain(self.folder, self.keep.keep_last, self.keep.keep_every)
                except OSError as error:
                    print(f"WARNING: an older checkpoint could not be removed: {error}", flush=True)
                return None
        shutil.rmtree(writing, ignore_errors=True)  # on a full disk it is what can be given back
        return f"{self.folder / step_name(progress.step)} could not be written: " + "; ".join(problems)


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def _write_file(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def publish(writing: Path, path: Path) -> None:
    """Gives a complete folder its name, then points `latest` to it."""
    _sync_folder(writing)
    if path.exists():  # the same step, reached again after `latest` was lost
        shutil.rmtree(path)
    writing.rename(path)
    _sync_folder(path.parent)
    atomic_write(path.parent / LATEST, path.name + "\n")


def retain(folder: Path, last: int, every: int) -> None:
    """Removes all but the last ones and those at multiples of `every` steps (0: none of those)."""
    there = sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name))
    for path in there[:-last]:
        step = int(path.name.removeprefix("step_"))
        if not every or step % every:
            shutil.rmtree(path)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
