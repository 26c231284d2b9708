"""What is normal: the curves of several runs of one config with a band around them, and whether another run lies within.

    python -m pretrain.compare.reference make docs/reference/demo_256.csv runs/seed_0 runs/seed_1 runs/seed_2
    python -m pretrain.compare.reference check docs/reference/demo_256.csv runs/demo_256

`make` writes the curves as they are, a column for each run, and draws them beside it as a PNG. `check` cuts each curve into
PARTS of equal numbers of steps and compares the mean of each part with the band: the runs' mean m, and

    m · (1 ± WIDTH · s · √(1 + 1/n))

where n is the number of runs and s the standard deviation of a run's mean relative to m, pooled over the curve's parts. With
three runs and eight parts s has 16 degrees of freedom: by Student's t one such mean in seven thousand lies outside.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.common.command import command_parser, run_action
from data_prep.common.files import atomic_write
from data_prep.common.paths import distinct_names, path
from pretrain.curves import curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = ("train/loss", "validation/loss", "validation_ema/loss", "train/gradient_norm")
PARTS, WIDTH = 8, 5.0


@dataclass(frozen=True)
class Part:
    """A part of a curve: its steps, after `start` up to `end`, and the band of its mean."""

    start: int
    end: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Reference:
    """Curves of several runs of one config: values [runs] by step, by curve."""

    runs: tuple[str, ...]
    curves: Mapping[str, Mapping[int, np.ndarray]]

    def band(self, curve: str) -> list[Part]:
        """The parts of a curve, without those in which it has no point."""
        values, last = self.curves[curve], max(self.curves[curve])
        edges = [round(last * i / PARTS) for i in range(PARTS + 1)]
        points = [(a, b, [values[step] for step in values if a < step <= b]) for a, b in pairwise(edges)]
        means = [(a, b, np.mean(there, axis=0)) for a, b, there in points if there]
        relative = [of_runs.var(ddof=1) / of_runs.mean() ** 2 for _, _, of_runs in means]
        half = WIDTH * math.sqrt(np.mean(relative) * (1 + 1 / len(self.runs)))
        return [Part(a, b, m := float(of_runs.mean()), m * (1 - half), m * (1 + half)) for a, b, of_runs in means]


# ---- the file ----


def collect(folders: Sequence[Path]) -> Reference:
    """The reference that runs make: the steps that all of them have. Raises ValueError for too few runs or points."""
    if len({folder.resolve() for folder in folders}) < max(len(folders), 2):
        raise ValueError("give two different run directories at least, three for a band that says something")
    found = [curves(folder, CURVES) for folder in folders]
    shared: dict[str, dict[int, np.ndarray]] = {}
    for tag in CURVES:
        steps = sorted(set.intersection(*(set(of_run.get(tag, {})) - {0} for of_run in found)))
        if steps:
            shared[tag] = {step: np.array([of_run[tag][step] for of_run in found]) for step in steps}
        for folder, of_run in zip(folders, np.array(list(shared.get(tag, {}).values())).T, strict=False):
            if not np.isfinite(of_run).all():
                raise ValueError(f"{folder}: {tag} is not finite, so the run cannot say what is normal; leave it out")
    if CURVES[0] not in shared:
        raise ValueError(
            f"{', '.join(map(str, folders))} have no step of {CURVES[0]} in common: give runs of one config that have "
            "trained for some steps (python -m pretrain.train writes tensorboard/ into its run directory)"
        )
    return Reference(tuple(distinct_names(folders)), shared)


def write(reference: Reference, file: Path) -> str:
    """Writes the CSV, and its picture beside it; returns where they are."""
    from pretrain.sampling.jobs import write_png  # late: torch and matplotlib take seconds
    from pretrain.sampling.plots import to_picture

    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["curve", "step", *reference.runs])
    for tag, values in reference.curves.items():
        rows.writerows([tag, step, *(f"{value:.6g}" for value in of_runs)] for step, of_runs in values.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, text.getvalue())
    picture = file.with_suffix(".png")
    write_png(to_picture(plot(reference)), picture)
    return f"see {file} and {picture}"


def read(file: Path) -> Reference:
    """Reads a CSV that `write` wrote. Raises ValueError where it is none."""
    try:
        head, *rows = list(csv.reader(file.read_text(encoding="utf-8").splitlines())) or [[]]
    except (UnicodeDecodeError, csv.Error):
        head, rows = [], []
    if head[:2] != ["curve", "step"] or len(head) < 4 or not rows:
        raise ValueError(
            f"{file}: no reference; python -m pretrain.compare.reference make {file} RUN RUN RUN writes one"
        )
    found: dict[str, dict[int, np.ndarray]] = {}
    for number, row in enumerate(rows, start=2):
        try:
            if len(row) != len(head):
                raise ValueError(f"{len(row)} columns instead of {len(head)}")
            tag, step, *values = row
            found.setdefault(tag, {})[int(step)] = np.array([float(value) for value in values])
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}; make it again") from error
    return Reference(tuple(head[2:]), found)


# ---- the comparison ----


def check(file: Path, run: Path) -> list[str]:
    """A line for each curve of the reference: within the band, or where it is not, and what is normal there.

    Raises ValueError where the file is no reference, or the run has none of its curves.
    """
    reference = read(file)
    found = curves(run, reference.curves)
    if not found:
        raise ValueError(
            f"{run} has none of the curves of {file} ({', '.join(reference.curves)}): give a run directory"
        )
    return [f"{tag}: {_verdict(reference.band(tag), found.get(tag, {}))}" for tag in reference.curves]


def _verdict(band: Sequence[Part], values: Mapping[int, float]) -> str:
    reached = [part for part in band if values and part.end <= max(values)]
    if not reached:
        return "not far enough to say" if values else "not recorded in this run"
    outside = []
    for part in reached:
        inside = [value for step, value in values.items() if part.start < step <= part.end]
        # A run with fewer points may have none here; what is not finite is outside, too.
        if inside and not part.low <= (mean := np.mean(inside)) <= part.high:
            steps = f"steps {part.start + 1} to {part.end}"
            outside.append(f"{mean:.4g} in {steps}, where {part.low:.4g} to {part.high:.4g} is normal")
    so_far = f"up to step {reached[-1].end}" if len(reached) < len(band) else "to the end"
    return "; ".join(outside) if outside else f"as in other runs, {so_far}"


def plot(reference: Reference) -> Figure:
    """A panel for each curve: every run pale, the band of each part's mean strong."""
    from matplotlib.figure import Figure

    from pretrain.sampling.plots import COLOURS, log_scale

    figure = Figure(figsize=(10, 2.6 * math.ceil(len(reference.curves) / 2)), layout="constrained")
    panels = figure.subplots(math.ceil(len(reference.curves) / 2), 2, squeeze=False).ravel()
    for panel, (tag, values) in zip(panels, reference.curves.items(), strict=False):
        steps, points = list(values), np.array(list(values.values()))
        for column, name in enumerate(reference.runs):
            panel.plot(
                steps, points[:, column], color=COLOURS[column % len(COLOURS)], alpha=0.5, linewidth=0.8, label=name
            )
        for part in reference.band(tag):
            panel.fill_between([part.start, part.end], part.low, part.high, color="0.3", alpha=0.25, linewidth=0)
            panel.plot([part.start, part.end], [part.mean] * 2, color="0.2", linewidth=1.2)
        panel.set(xlabel="step", ylabel=tag)
        if points.max() > 5 * points.min():
            log_scale(panel)
        panel.grid(alpha=0.3)
    for panel in panels[len(reference.curves) :]:
        panel.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(reference.runs))
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser(
        "Keeps the curves of several runs of one config, and says whether another run lies within them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words, runs in (("make", "write the CSV and its PNG", "+"), ("check", "compare a run with it", None)):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("file", type=path, help="CSV, such as docs/reference/demo_256.csv")
        command.add_argument("runs", type=path, nargs=runs, metavar="RUN", help="run directory")
    args = parser.parse_args(argv)
    return run_action("reference", lambda: _answer(args))


def _answer(args: argparse.Namespace) -> str:
    return write(collect(args.runs), args.file) if args.command == "make" else "\n".join(check(args.file, args.runs))


if __name__ == "__main__":
    sys.exit(main())
