"""Results of an evaluation: a JSON file for each metric, a table, a plot, and TensorBoard's curves of the run."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.command import program
from data_prep.common.files import atomic_write
from pretrain.checkpoint.reader import find_run
from pretrain.curves import curve
from pretrain.evaluate.metric import Result
from pretrain.evaluate.pictures import PictureSet
from pretrain.evaluate.plots import plot_results
from pretrain.sampling.jobs import write_png
from pretrain.sampling.plots import to_picture

LIBRARIES = ("torch", "transformers", "diffusers")


class Report:
    """Collects the metrics' results.

    Files: OUT/METRIC.json, OUT/table.md, OUT/results.png; for a run's checkpoint RUN/evaluate/tensorboard, too, whose curves
    have the training step as their axis.
    """

    def __init__(self, args: argparse.Namespace, found: PictureSet):
        self.args, self.found = args, found
        self._not_run: dict[str, str] = {}

    def add(self, name: str, result: Result, identity: Mapping[str, Any]) -> None:
        """Writes a metric's result."""
        values = {key: asdict(value) for key, value in result.values.items()}
        self._write(name, {"status": "done", "values": values, "notes": dict(result.notes), "scorer": dict(identity)})
        if "run" in self.found.origin:
            curves = {f"evaluate/{name}/{key}": value.value for key, value in result.values.items()}
            put_on_curves(find_run(self.found.origin["run"]) / "evaluate", curves, self.found.origin["step"])

    def not_run(self, name: str, reason: str) -> None:
        """Notes why there is no result; `finish` writes it."""
        self._not_run[name] = reason

    def pending(self, names: Sequence[str]) -> list[str]:
        """The metrics that have no result of these pictures yet, as other processes have still to draw or judge some."""
        return [name for name in names if name not in self._not_run and not self._is_done(name)]

    def _is_done(self, name: str) -> bool:
        path = self.args.out / f"{name}.json"
        return not self.found.missing and path.is_file() and read(path)["pictures"]["sha256"] == self.found.sha256

    def _write(self, name: str, about: Mapping[str, Any]) -> None:
        seeds = [p.seed for p in self.found.pictures if p.seed is not None]
        content = {
            "metric": name,
            **about,
            "pictures": {
                "count": len(self.found.pictures),
                "sha256": self.found.sha256,
                "seeds": [min(seeds), max(seeds)] if seeds else None,
                **self.found.origin,
            },
            "command": shlex.join([*program().split(), *sys.argv[1:]]),
            "versions": {library: version(library) for library in LIBRARIES},
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        atomic_write(self.args.out / f"{name}.json", json.dumps(content, indent=1) + "\n")

    def finish(self) -> str:
        """Writes the table and the plot of all results in OUT, also of earlier commands, and returns the table."""
        for name, reason in self._not_run.items():
            self._write(name, {"status": "not run", "reason": reason})
        results = [r for path in sorted(self.args.out.glob("*.json")) if "metric" in (r := read(path))]
        text = table(results, self.found.sha256)
        atomic_write(self.args.out / "table.md", text + "\n")
        of_these = [r for r in results if r["status"] == "done" and r["pictures"]["sha256"] == self.found.sha256]
        if of_these:
            write_png(to_picture(plot_results(of_these)), self.args.out / "results.png")
        return text


def put_on_curves(folder: Path, values: Mapping[str, float], step: int) -> None:
    """Writes values at a step into folder/tensorboard, unless they are there already."""
    from torch.utils.tensorboard import SummaryWriter  # late: it takes a second

    new = {tag: value for tag, value in values.items() if not _same(curve(folder, tag).get(step), value)}
    if new:
        with SummaryWriter(str(folder / "tensorboard")) as writer:
            for tag, value in new.items():
                writer.add_scalar(tag, value, step)


def _same(one: float | None, other: float) -> bool:
    """Whether values are equal in fp32, which event files keep."""
    return one is not None and bool(np.array_equal(np.float32(one), np.float32(other), equal_nan=True))


def table(results: list[dict[str, Any]], pictures: str) -> str:
    """Results in Markdown; those of other pictures than these are named below it."""
    lines, others = ["| metric | figure | value | ± SEM | pictures |", "|---|---|---|---|---|"], []
    for result in results:
        name = result["metric"]
        if result["pictures"]["sha256"] != pictures:
            others.append(name)
        elif result["status"] != "done":
            lines.append(f"| {name} | not run: {result['reason']} | | | |")
        else:
            lines += [_line(name, key, value) for key, value in result["values"].items()]
    if others:
        lines.append(
            f"\nOf other pictures, and not shown: {', '.join(others)}. Repeat them with --metrics {' '.join(others)}."
        )
    return "\n".join(lines)


def _line(metric: str, name: str, value: Mapping[str, Any]) -> str:
    sem = "" if value["sem"] is None else f"{value['sem']:.4f}"
    shown = "NaN" if math.isnan(value["value"]) else f"{value['value']:.4f}"
    return f"| {metric} | {name} | {shown} | {sem} | {value['count']} |"


def read(path: Path) -> dict[str, Any]:
    """A result that was written."""
    return dict(json.loads(path.read_text(encoding="utf-8")))
