"""Cells of a study, a row with one seed each: trained, drawn and judged by the commands that a user would type.

    OUT/ROW_SEED/run/            the training
    OUT/ROW_SEED/pruned/         a pruned row's model
    OUT/ROW_SEED/evaluation/     pictures and the metrics' results
    OUT/ROW_SEED/cell.json       the cell's figures, once it is done
    OUT/ROW_SEED/log.txt         what its commands printed

What is done is not done again; a training that was stopped goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median_high
from typing import Any

from data_prep.common.files import atomic_write
from data_prep.encoders import DOWNSAMPLE
from data_prep.schema import CARD
from data_prep.shapes import scenes
from pretrain.ablate.study import Row, Scale, Study
from pretrain.checkpoint.export_folder import read_json
from pretrain.config import Config, load
from pretrain.curves import curve
from pretrain.demo import PROMPT_SEED
from pretrain.models.cost import CAPTION, count_parameters, grid_of, mean_flops, training_phases

VALIDATION = {"validation/loss": "validation loss", "validation_ema/loss": "validation loss, average"}
CELL = "cell.json"  # a cell's figures
PRUNED = "pruned"  # the folder of a pruned row's model
LAST = 0.1  # share of the steps over whose end the training loss is averaged


@dataclass(frozen=True)
class Judging:
    """How pictures are judged: the prompts file, the metrics, and further options of `pretrain.evaluate`."""

    prompts: Path
    metrics: Sequence[str]
    options: Sequence[str] = ()


@dataclass(frozen=True)
class Cell:
    """A row with one seed."""

    study: Study
    scale: Scale
    name: str
    seed: int
    out: Path
    more: tuple[str, ...] = ()
    """Further overrides of every training."""

    @property
    def row(self) -> Row:
        return self.study.rows[self.name]

    @property
    def folder(self) -> Path:
        return self.out / f"{self.name}_{self.seed}"

    @property
    def trained(self) -> Cell:
        """The cell whose training this one draws from."""
        return self if self.row.trained_as is None else self.of_row(self.row.trained_as)

    def of_row(self, row: str) -> Cell:
        """The cell of another row with the same seed."""
        return replace(self, name=row)

    @cached_property
    def settings(self) -> list[str]:
        """The overrides of the training. Raises ValueError where they follow from times that are not measured yet."""
        row = self.trained.row
        own = [*self.study.settings(self.trained.name, self.scale, self.seed), *self.more]
        if row.equal == "images":
            return own
        first = self.of_row(next(iter(self.study.rows)))
        ratio = (
            first.forward_flops / forward_flops(self.phases(load(self.scale.config, own)[0]))
            if row.equal == "flops"
            else first.step_s / self.of_row(row.timed_by or self.name).step_s
        )
        return [*own, f"steps={round(load(self.scale.config, own)[0].steps * ratio)}"]

    @property
    def forward_flops(self) -> float:
        """Forward FLOPs of an image, the mean over the training's steps."""
        return forward_flops(self.phases(load(self.scale.config, self.settings)[0]))

    @property
    def step_s(self) -> float:
        """The measured seconds of a step, the mean over the training's phases. Raises ValueError before the cell is done."""
        if (done := self.finished) is None:
            raise ValueError(
                f"the steps of equal seconds follow from the time of {self.name}, seed {self.seed}: do it first"
            )
        return float(done["step_s"])

    @property
    def is_there(self) -> bool:
        """Whether there are figures, of whatever settings."""
        return (self.folder / CELL).is_file()

    @property
    def finished(self) -> Mapping[str, Any] | None:
        """The cell's figures; None until it is done. Raises ValueError where they are of other settings."""
        if not self.is_there:
            return None
        there = json.loads((self.folder / CELL).read_text(encoding="utf-8"))
        if there["settings"] != self.settings:
            raise ValueError(
                f"{self.folder} was made with other settings ({' '.join(there['settings'])}): choose another --out, or remove it"
            )
        return dict(there)

    # ---- the commands ----

    def commands(self, judging: Judging, processes: int) -> list[list[str]]:
        """The commands that are still to be run, in order."""
        python, run = [sys.executable, "-m"], self.trained.folder / "run"
        launcher = ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
        train = [*python, *launcher, "pretrain.train", self.scale.config, *self.settings, f"run_dir={run}"]
        source, commands = ["--run", str(run)], [] if self.trained.finished else [train]
        if self.row.prune:
            pruned = self.folder / PRUNED
            source = ["--model", str(pruned)]
            prune = ["--run", str(run), "--prompts", str(judging.prompts), "--remove", str(self.scale.prune)]
            if not pruned.is_dir():
                commands.append([*python, "pretrain.prune", *prune, "--out", str(pruned)])
        judge = [*python, *launcher, "pretrain.evaluate", *source, "--prompts", str(judging.prompts), "--metrics"]
        out = ["--out", str(self.folder / "evaluation"), *judging.options, *self.row.drawing]
        return [*commands, [*judge, *judging.metrics, *out]]

    def run(self, judging: Judging, processes: int, threads: int) -> Mapping[str, Any]:
        """Does what is missing; returns the cell's figures. Raises RuntimeError where a command fails."""
        if (there := self.finished) is not None:
            return there
        self.folder.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        start = time.monotonic()
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            for command in self.commands(judging, processes):
                log.write(f"\n$ {shlex.join(['python', *command[1:]])}\n")
                log.flush()
                code = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
                if code:
                    raise RuntimeError(
                        f"{self.name}, seed {self.seed}: exit code {code}; {self.folder / 'log.txt'} says why"
                    )
        found = self._figures(judging, time.monotonic() - start)
        atomic_write(self.folder / CELL, json.dumps(found, indent=1) + "\n")
        return found

    def _figures(self, judging: Judging, seconds: float) -> dict[str, Any]:
        run, config = self.trained.folder / "run", load(self.scale.config, self.settings)[0]
        losses = curve(run, "train/loss")
        last = [value for step, value in losses.items() if step > (1 - LAST) * config.steps]
        step_s = curve(run, "speed/step_s")
        figures = {"train loss": sum(last) / len(last)}
        for tag, name in VALIDATION.items():
            if held_out := curve(run, tag):
                figures[name] = held_out[max(held_out)]
        for metric in judging.metrics:
            result = json.loads((self.folder / "evaluation" / f"{metric}.json").read_text(encoding="utf-8"))
            figures |= {f"{metric}: {key}": v["value"] for key, v in result.get("values", {}).items()}
        drawn = config
        if self.row.prune:
            pruned = json.loads((self.folder / PRUNED / "prune.json").read_text(encoding="utf-8"))
            drawn = load(self.scale.config, [*self.settings, f"model.removed_ffns={pruned['removed_ffns']}"])[0]
        return {
            "row": self.name,
            "seed": self.seed,
            "settings": self.settings,
            "figures": figures,
            "parameters": count_parameters(drawn.model.backbone()).total,
            "flops": forward_flops(self.phases(drawn, run)),
            "steps": config.steps,
            "step_s": mean_step_s(step_s, [end for end, _ in self.phases(config, run)]) if step_s else None,
            "seconds": seconds,
        }

    def phases(self, config: Config, folder: Path | None = None) -> list[tuple[int, float]]:
        """FLOPs of an image in each phase of a training, of which the first may leave tokens out or align them.

        `folder`: where the data set's card lies, by default with the data set; a run has a copy.
        """
        backbone, tokens = config.model.backbone(), self.scale.caption_tokens or CAPTION
        grid, routing = grid_of(backbone, config.data.resolution, DOWNSAMPLE), config.routing.build(backbone)
        alignment, width = config.alignment.build(backbone), 0
        if alignment is not None:
            width = read_json((folder or Path(config.data.path)) / CARD)["features"]["width"]
        return training_phases(backbone, grid, tokens, config.steps, routing, alignment, width)


def forward_flops(phases: Sequence[tuple[int, float]]) -> float:
    """Forward FLOPs of an image, the mean over a training's phases."""
    return mean_flops(phases) / 3


def mean_step_s(step_s: Mapping[int, float], ends: Sequence[int]) -> float:
    """Seconds of a step, the mean over the steps of phases, each taken as its median step.

    Args:
        step_s: measured seconds by step.
        ends: the step with which each phase ends; one without a measured step is taken as the median of all.
    """
    phases = []
    for start, end in pairwise([0, *ends]):
        inside = [seconds for step, seconds in step_s.items() if start < step <= end]
        phases.append((end, median_high(inside or step_s.values())))
    return mean_flops(phases)


def shapes_prompts(path: Path, count: int) -> Path:
    """Writes captions of shapes that no training picture has."""
    atomic_write(path, "".join(f"{scene.caption}\n" for scene in scenes(count, PROMPT_SEED)))
    return path
