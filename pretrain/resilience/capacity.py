"""Capacity that a stage needs: bytes on disks, in shared memory and on GPUs, compared with those that are there.

A problem is a line: the place, the bytes that are free, those that are needed, and the mend.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

from data_prep import schema
from data_prep.common.words import counted
from data_prep.encoders import DOWNSAMPLE
from pretrain.checkpoint.reader import FOLDER
from pretrain.config import Config
from pretrain.data.location import DataLocation
from pretrain.models.cost import CAPTION, count_activations, count_hidden_matrices, count_parameters, grid_of

GIB = 1 << 30
UNITS = {"mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}  # of data.cache_limit, as streaming reads them


def checkpoint_bytes(config: Config) -> int:
    """Size of one checkpoint: weights, moments and averages in fp32, 16 bytes a parameter with AdamW and one average."""
    weights = 1 + len(config.optimizer.averages())
    return 4 * (weights * count_parameters(config.model.backbone()).total + _moments(config))


def kept_checkpoint_bytes(config: Config) -> int:
    """Largest size of a run's checkpoints: the newest, those kept for ever, and the one that is being written."""
    keep = config.checkpoint
    for_ever = config.steps // lcm(keep.every, keep.keep_every) if keep.keep_every else 0
    return checkpoint_bytes(config) * (keep.keep_last + for_ever + 1)


def run_dir_problems(config: Config) -> list[str]:
    """A problem where the disk of the run directory cannot take the checkpoints still to come."""
    there = sum(_bytes_in(folder) for folder in (config.run_dir / FOLDER).glob("step_*"))
    needed = kept_checkpoint_bytes(config) - there
    return disk_problems(
        "run_dir", config.run_dir, needed, "for its checkpoints; free some, or keep fewer (checkpoint)"
    )


def cache_problems(config: Config, card: schema.Card) -> list[str]:
    """A problem where the disk of the data cache cannot take all that the cache may grow to."""
    cache, limit = config.data.cache, config.data.cache_limit
    if cache is None:
        return []
    most = sum(about["bytes"] for about in card.sets_with(config.data.resolution).values())
    if limit is not None:
        most = min(most, int(float(limit[:-2]) * UNITS[limit[-2:]]))
    needed = most - _bytes_in(DataLocation.of(config.data).root)
    return disk_problems("data.cache", cache, needed, "for the data set's shards; free some, or lower data.cache_limit")


def shared_memory_problems(folder: Path, config: Config, card: schema.Card, samples: int) -> list[str]:
    """A problem where a node's shared memory cannot hold the batches that its loaders keep ready.

    Args:
        samples: samples of one step on this node; their captions are taken at the token cap.
    """
    data = config.data
    side, kinds = data.resolution // card.vae["downsample"], 2 if card.posterior == "mean_std" else 1
    sample = 2 * (kinds * card.vae["channels"] * side**2 + card.token_cap * card.text_encoder["width"])
    if config.alignment.weight and card.features is not None:
        sample += 2 * (data.resolution // card.features["cell"]) ** 2 * card.features["width"]
    mend = "for the batches kept ready; mount it larger (--shm-size), or lower data.workers or data.prefetch"
    return disk_problems("shared memory", folder, data.workers * data.prefetch * samples * sample, mend)


def disk_problems(what: str, folder: Path, needed: int, why: str) -> list[str]:
    """A problem where a folder, which need not exist yet, cannot take `needed` bytes more."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return [f"{what}: {folder} cannot be written, as {there} {'may not be' if there.is_dir() else 'is no folder'}"]
    free = shutil.disk_usage(there).free
    return [f"{what}: {folder} has {gib(free)} free, {gib(needed)} are needed {why}"] if free < needed else []


def memory_problems(config: Config, deepspeed: dict[str, Any], processes: int, there: int) -> list[str]:
    """A problem where a GPU of `there` bytes is too small: a lower bound, without activations and buffers."""
    states = state_bytes(config, deepspeed, processes)
    if states <= there:
        return []
    more = "take more processes, or GPUs with more memory"
    needed = f"weights, gradients and AdamW's state alone take {gib(states)} with {counted(processes, 'process', 'processes')}"
    return [f"GPU memory: {gib(there)} on a GPU, but {needed}; {more}"]


@dataclass(frozen=True)
class States:
    """Bytes of ZeRO-2 on each process: weights and fp32 gradients whole, a share of all else in fp32; without padding.

    Attributes:
        average: of all averages of the weights together.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    average: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments + self.average


def states(config: Config, deepspeed: dict[str, Any], processes: int) -> States:
    """A stage's states on each of `processes` GPUs."""
    parameters = count_parameters(config.model.backbone()).total
    weights = (2 if deepspeed.get("bf16", {}).get("enabled") else 4) * parameters
    share = 4 * parameters // processes
    averages = len(config.optimizer.averages()) * share
    return States(weights, 4 * parameters, share, 4 * _moments(config) // processes, averages)


def state_bytes(config: Config, deepspeed: dict[str, Any], processes: int) -> int:
    """Bytes of a stage's states on each GPU."""
    return states(config, deepspeed, processes).total


def _moments(config: Config) -> int:
    """Elements of the optimizer's moments: two for each parameter, one for Muon's."""
    shape = config.model.backbone()
    single = count_hidden_matrices(shape) if config.optimizer.name == "muon" else 0
    return 2 * count_parameters(shape).total - single


def activation_bytes(config: Config, micro: int) -> int:
    """Estimated bytes that a micro-batch keeps for its backward pass, in bf16, with captions of CAPTION tokens."""
    c = config.model.backbone()
    grid = grid_of(c, config.data.resolution, DOWNSAMPLE)
    return round(micro * count_activations(c, grid, CAPTION, recompute=config.model.recompute))


def _bytes_in(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def gib(count: int) -> str:
    """Bytes as GiB."""
    return f"{count / GIB:.1f} GiB"
