"""Records of a run, as its directory keeps them, flattened to named values and curves.

FLOPs are those of the config, three forward passes for each image, with a caption of CAPTION tokens, as the captions' own lengths
are not recorded. Hours are those of training steps (`speed/step_s`), without checkpoints, previews, validations and the time
between starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encoders import DOWNSAMPLE
from data_prep.schema import CARD
from pretrain.checkpoint.export_folder import read_json
from pretrain.config import Config, kept_config
from pretrain.config_files import KEPT_CONFIG, KEPT_DEEPSPEED, flatten
from pretrain.curves import curves
from pretrain.models.cost import CAPTION, grid_of, training_phases

ENVIRONMENT = "environment.json"
FILES = (KEPT_CONFIG, KEPT_DEEPSPEED, ENVIRONMENT, CARD)
TRAINING = "train/loss"
LOSSES = (TRAINING, "validation/loss", "validation_ema/loss")
STEP_S = "speed/step_s"
AXES = ("images", "FLOPs", "hours")


@dataclass(frozen=True)
class Run:
    """A run's records.

    Attributes:
        facts: config, DeepSpeed, code and data set, each value by its dotted name.
        flops: FLOPs of an image in each phase of the steps, after the step with which the phase ends.
        losses: curves of LOSSES that the run has, by step.
        seconds: of training up to a step, at the steps where it is known.
    """

    name: str
    facts: dict[str, Any]
    batch: int
    flops: tuple[tuple[int, float], ...]
    losses: dict[str, dict[int, float]]
    seconds: dict[int, float]

    def places(self, steps: Sequence[int], axis: str) -> np.ndarray:
        """Steps in another unit: images, FLOPs, or hours (between two known steps in proportion)."""
        at = np.asarray(steps, dtype=float)
        if axis == "images":
            return at * self.batch
        if axis == "FLOPs":
            ends = [0, *(end for end, _ in self.flops)]
            inside = (at.clip(max=end) - at.clip(max=start) for start, end in pairwise(ends))
            return self.batch * sum(steps * flops for steps, (_, flops) in zip(inside, self.flops, strict=True))
        assert axis == "hours"
        return np.interp(at, [0, *self.seconds], [0, *self.seconds.values()]) / 3600


def read_runs(folders: Sequence[Path], names: Sequence[str]) -> list[Run]:
    """Reads the runs. Raises ValueError that says all records that are missing, and how they are made."""
    lacking = [f"{folder} has no {', no '.join(missing)}" for folder in folders if (missing := missing_records(folder))]
    if lacking:
        raise ValueError(
            f"{'; '.join(lacking)}. python -m pretrain.train writes the files into its run directory when it starts, "
            "and the curves every logging.every steps: give run directories, and let them train that far"
        )
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def missing_records(folder: Path) -> list[str]:
    """The files and curves that a comparison needs and a folder lacks."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    there = curves(folder, (TRAINING, STEP_S))
    return missing + [f"curve {tag} in tensorboard/" for tag in (TRAINING, STEP_S) if not there.get(tag)]


def read_run(folder: Path, name: str) -> Run:
    """Reads a run that has all records. Raises ValueError where one is damaged."""
    config = kept_config(folder)
    deepspeed, environment, card = (read_json(folder / file) for file in (KEPT_DEEPSPEED, ENVIRONMENT, CARD))
    backbone = config.model.backbone()
    grid, features = grid_of(backbone, config.data.resolution, DOWNSAMPLE), (card.get("features") or {}).get("width", 0)
    methods = config.routing.build(backbone), config.alignment.build(backbone)
    found = curves(folder, (*LOSSES, STEP_S))
    if type(deepspeed.get("train_batch_size")) is not int:
        raise ValueError(f"{folder / KEPT_DEEPSPEED}: train_batch_size must be a whole number, as a training writes it")
    facts = flatten(
        {"config": settings_of(config), "deepspeed": deepspeed, "code": code_of(environment), "data set": card}
    )
    return Run(
        name,
        facts,
        deepspeed["train_batch_size"],
        tuple(training_phases(backbone, grid, CAPTION, config.steps, *methods, features)),
        {tag: found[tag] for tag in LOSSES if tag in found},
        seconds_by_step(found[STEP_S]),
    )


def settings_of(config: Config) -> dict[str, Any]:
    """The config without the run's own name and folder, and with every field of its backbone in place of the preset's name."""
    settings = config.model_dump(mode="json", exclude={"name", "run_dir"})
    settings["model"] |= asdict(config.model.backbone())
    return settings


def code_of(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Revision, uncommitted changes (as a hash), versions, processes and device of a run's last start."""
    revision, diff = environment.get("git_revision"), environment.get("git_dirty_diff")
    changes = "none"
    if diff:
        changes = f"{len(diff.splitlines())} lines of diff, SHA-256 {hashlib.sha256(diff.encode()).hexdigest()[:12]}"
    return {
        "revision": revision or "unknown: not started in a git checkout",
        "uncommitted changes": "unknown" if diff is None else changes,
        **{key: environment.get(key) for key in ("versions", "processes", "device")},
    }


def seconds_by_step(step_s: Mapping[int, float]) -> dict[int, float]:
    """Seconds of training up to each logged step: its mean seconds a step, times the steps since the one before."""
    steps = sorted(step_s)
    spent = np.cumsum([step_s[b] * (b - a) for a, b in pairwise([0, *steps])])
    return dict(zip(steps, spent.tolist(), strict=True))
