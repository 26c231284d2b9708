"""Writing checkpoints, in the background of the training if asked.

Each process writes its partitions into a folder of another name, hashes its file and tells process 0 through a store; process
0 describes the folder by `state.json`, renames it, and only then replaces `latest`. All of that happens in threads, without a
collective. A failure (a full disk, say) leaves the older checkpoints as they are, and training goes on.
"""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_prep.common.files import atomic_write, permit_as_umask, sha256, sync_path
from pretrain.checkpoint.reader import FOLDER, FORMAT, LATEST, STATE, file_name, step_name, with_hash
from pretrain.config import Config
from pretrain.distributed.ema import Ema
from pretrain.distributed.engine import Engine
from pretrain.distributed.store import DistError, KeyValueStore
from pretrain.distributed.world import barrier
from pretrain.state import RunState

# Seconds that process 0 waits for the others' files, which are written at the same time as its own.
TIMEOUT = 1800.0


class CheckpointWriter:
    """Writes the checkpoints of a run. All processes call `save` and `wait` at the same steps.

    Args:
        run_info: what `state.json` says of the run beside its position: its `config`, and the fingerprint of its `data`.

    Attributes:
        error: why the last checkpoint could not be written; None where it could, or is not ready yet.
    """

    def __init__(self, config: Config, engine: Engine, ema: Ema, run_info: dict[str, Any]):
        self.folder, self.settings = config.run_dir / FOLDER, config.checkpoint
        self.engine, self.ema, self.run_info = engine, ema, run_info
        self.error: str | None = None
        self._store = KeyValueStore(TIMEOUT)
        self._thread: threading.Thread | None = None
        self._host_copies: dict[str, Tensor] = {}
        self._saves, self._unreported = 0, cast(str | None, None)

    def save(self, run_state: RunState, pending_sums: list[float]) -> None:
        """Starts to write a checkpoint, once the one before is finished.

        Args:
            pending_sums: the monitor's sums of this process, which `Checkpoint.pending_sums` gives back.

        Without `checkpoint.background` it is finished, or has failed, when this returns.
        """
        self.wait()
        self.error, self._unreported = None, step_name(run_state.step)
        self._saves += 1
        if self.engine.world.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.glob(".writing-*"):
                    shutil.rmtree(leftover)
                self._writing(run_state).mkdir()
            except OSError as error:
                self.error = str(error)
        barrier(self.engine.world)
        tensors = self._tensors(copied=self.settings.background)
        self._thread = threading.Thread(target=self._write, args=(run_state, pending_sums, tensors), daemon=True)
        self._thread.start()
        if not self.settings.background:
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is published, or has failed, for all processes."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def report(self) -> str | None:
        """A line for the log about the last checkpoint, once it is published or has failed; None before and afterwards."""
        if self._unreported is None or (self._thread is not None and self._thread.is_alive()):
            return None
        name, self._unreported = self._unreported, None
        if self.error:
            return f"WARNING: {self.error}; training goes on, the checkpoints before are whole"
        return f"checkpoint {self.folder / name}"

    def _writing(self, run_state: RunState) -> Path:
        return self.folder / f".writing-{step_name(run_state.step)}"

    def _tensors(self, copied: bool) -> dict[str, Tensor]:
        """This process's partitions, copied into host memory that is kept for the next time (pinned for GPUs)."""
        kinds = {"master": self.engine.masters, **self.ema.partitions, **self.engine.moments()}
        tensors = {f"{k}.{g}": t.detach() for k, partitions in kinds.items() for g, t in enumerate(partitions)}
        if not copied:
            return {name: t.contiguous() for name, t in tensors.items()}
        for name, t in tensors.items():
            if name not in self._host_copies:
                self._host_copies[name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            self._host_copies[name].copy_(t, non_blocking=True)
        if self.engine.world.device.type == "cuda":
            torch.cuda.synchronize()
        return self._host_copies

    # ---- in the thread ----

    def _write(self, run_state: RunState, pending_sums: list[float], tensors: dict[str, Tensor]) -> None:
        world, writing = self.engine.world, self._writing(run_state)
        mine: dict[str, Any] = {"name": file_name(world.rank, world.size), "totals": pending_sums}
        try:
            if self.error:
                raise OSError(self.error)
            mine |= _write_file(writing / mine["name"], tensors)
        except Exception as error:  # of any kind: the other processes wait to hear of it
            mine["error"] = str(error)
        try:
            self._store.set(f"saved/{self._saves}/{world.rank}", mine)
            if world.rank == 0:
                self._store.set(f"saved/{self._saves}", self._finish(run_state, writing))
            self.error = self._store.get_all([f"saved/{self._saves}"])[0]
        except DistError as error:
            self.error = f"{writing}: not all processes wrote their part within {TIMEOUT / 60:.0f} minutes ({error})"
        except Exception as error:
            self.error = f"{writing}: {error!r}"

    def _finish(self, run_state: RunState, writing: Path) -> str | None:
        """Publishes the folder that all processes have written, in process 0; or removes it and returns why."""
        ranks = range(self.engine.world.size)
        files = self._store.get_all([f"saved/{self._saves}/{rank}" for rank in ranks])
        problems = [f"process {rank}: {f['error']}" for rank, f in zip(ranks, files, strict=True) if "error" in f]
        if not problems:
            state = {
                "format": FORMAT,
                "progress": run_state.to_json(),
                "totals": [f["totals"] for f in files],
                "world": len(ranks),
                "layout": self.engine.layout,
                "layout_hash": self.engine.layout_hash,
                "shares": [m.numel() for m in self.engine.masters],
                **self.run_info,
                "files": {f["name"]: {"bytes": f["bytes"], "sha256": f["sha256"]} for f in files},
            }
            try:
                atomic_write(writing / STATE, with_hash(state))
                publish(writing, self.folder / step_name(run_state.step))
            except OSError as error:
                problems = [f"process 0: {error}"]
            else:
                try:
                    remove_old(self.folder, self.settings.keep_last, self.settings.keep_every)
                except OSError as error:
                    print(f"WARNING: an older checkpoint could not be removed: {error}", flush=True)
                return None
        shutil.rmtree(writing, ignore_errors=True)  # on a full disk it is what can be given back
        return f"{self.folder / step_name(run_state.step)} could not be written: " + "; ".join(problems)


def _write_file(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_file(tensors, path)
    permit_as_umask(path)
    sync_path(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def publish(writing: Path, path: Path) -> None:
    """Gives a complete folder its name, then points `latest` to it."""
    sync_path(writing)
    if path.exists():  # the same step, reached again after `latest` was lost
        shutil.rmtree(path)
    writing.rename(path)
    sync_path(path.parent)
    atomic_write(path.parent / LATEST, path.name + "\n")


def remove_old(folder: Path, keep_last: int, keep_every: int) -> None:
    """Removes all checkpoints but the last `keep_last` and those at multiples of `keep_every` steps (0: none of those)."""
    checkpoints = sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name))
    for path in checkpoints[:-keep_last]:
        step = int(path.name.removeprefix("step_"))
        if not keep_every or step % keep_every:
            shutil.rmtree(path)
