"""Differences between runs, and their losses at equal images, FLOPs and hours: a table, and the curves as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_prep.common.files import atomic_write
from data_prep.common.paths import distinct_names
from pretrain.compare.records import AXES, LOSSES, TRAINING, Run, read_runs
from pretrain.models.cost import CAPTION
from pretrain.sampling.jobs import write_png
from pretrain.sampling.plots import COLOURS, LINES, log_scale, to_picture

WINDOW = 0.1  # of the way to a place: a training loss there is the mean over it
SHARES = (0.25, 0.5, 1.0)  # of the way that all runs have gone
WIDEST = 60  # characters of a value


def run(folders: Sequence[Path], out: Path | None) -> str:
    """Compares runs; writes compare.md and compare.png into `out`. Returns the table.

    Raises:
        ValueError: fewer than two runs, one twice, or one that lacks records, with how to make them.
    """
    if len({folder.resolve() for folder in folders}) < max(len(folders), 2):
        raise ValueError("give two different run directories at least")
    runs = read_runs(folders, distinct_names(folders))
    text = table(runs)
    if out is None:
        return text
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "compare.md", text + "\n")
    write_png(to_picture(plot(runs)), out / "compare.png")
    return f"{text}\n\nsee {out / 'compare.png'} and compare.md"


# ---- the table ----


def table(runs: Sequence[Run]) -> str:
    """Differences, then losses, as Markdown."""
    names = [run.name for run in runs]
    lines = ["What differs:", "", *_rows(["", *names], differences(runs)), ""]
    lines += [
        "Loss: of training the mean over the last tenth of the way there, of validation in proportion between two points.",
        f"FLOPs: with {CAPTION} tokens of text. Hours: of training steps, without checkpoints, previews and validations.",
        "",
        *_rows(["loss", "at equal", "", *names], losses(runs)),
    ]
    return "\n".join([*lines, *(f"\nNote: {note}." for note in notes(runs))])


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each fact that is not the same in all runs."""
    keys = list(dict.fromkeys(key for run in runs for key in run.facts))
    rows = [[key, *(_shown(run.facts.get(key)) for run in runs)] for key in keys if _differs(runs, key)]
    return rows or [["nothing", *[""] * len(runs)]]


def _differs(runs: Sequence[Run], key: str) -> bool:
    return any(run.facts.get(key) != runs[0].facts.get(key) for run in runs[1:])


def _shown(value: Any) -> str:
    text = "" if value is None else str(value).replace("|", "/")
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def losses(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each loss that all runs have, each axis, and each share of the way that all have gone on it."""
    rows = []
    for tag in shared_losses(runs):
        for axis in AXES:
            whole = min(run.places(list(run.losses[tag]), axis).max() for run in runs)
            for share in SHARES:
                values = [loss_at(run, tag, axis, share * whole) for run in runs]
                rows.append([tag, axis, f"{share * whole:,.4g}", *values])
    return rows


def shared_losses(runs: Sequence[Run]) -> list[str]:
    """The curves that all runs have."""
    return [tag for tag in LOSSES if all(run.losses.get(tag) for run in runs)]


def loss_at(run: Run, tag: str, axis: str, place: float) -> str:
    """A loss at a place of an axis; values that are not finite are counted, and make it so."""
    values = values_at(run, tag, axis, place)
    if not len(values):
        return "none yet"
    odd = int((~np.isfinite(values)).sum())
    mean = f"{values.mean():.4f}"
    return f"{mean} ({odd} of {len(values)} points not finite)" if odd else mean


def values_at(run: Run, tag: str, axis: str, place: float) -> np.ndarray:
    """What a loss at a place is the mean of; empty before the curve's first point.

    Of a training loss, which is noisy, the values in the last tenth of the way there, the last one at least; of a validation
    loss, always of the same samples and noise, the value between its two neighbours in proportion.
    """
    steps = sorted(run.losses[tag])
    at, values = run.places(steps, axis), np.asarray([run.losses[tag][step] for step in steps])
    reached = at <= place * (1 + 1e-9)
    if tag != TRAINING:
        return np.interp([place], at, values) if reached.any() else values[:0]
    within = reached & (at > place * (1 - WINDOW))
    return values[within] if within.any() else values[reached][-1:]


def notes(runs: Sequence[Run]) -> list[str]:
    """What makes the losses or hours hard to compare."""
    found = []
    if any(_differs(runs, key) for run in runs for key in run.facts if key.startswith("config.objective.")):
        found.append("the objectives differ, so that a loss of one does not compare with one of another")
    routed = any(run.facts.get("config.routing.name", "none") != "none" for run in runs)
    if routed and any(_differs(runs, key) for run in runs for key in run.facts if key.startswith("config.routing.")):
        found.append(
            "token routing differs, so that a train/loss of one does not compare with one of another; others do"
        )
    if any(_differs(runs, key) for key in ("config.data.resolution", "data set.fingerprint")):
        found.append("resolution or encoders differ, so that a loss of one does not compare with one of another")
    if any(_differs(runs, key) for key in ("code.device", "code.processes")):
        found.append("devices or processes differ, so that an hour of one is not an hour of another")
    if any(str(run.facts["code.revision"]).startswith("unknown") for run in runs):
        found.append("the code's revision is unknown where a training was not started in a git checkout")
    missing = [tag for tag in LOSSES if tag not in shared_losses(runs) and any(tag in run.losses for run in runs)]
    if missing:
        found.append(f"{', '.join(missing)}: not in every run, so left out (data.validation makes validation losses)")
    return found


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown rows of equal widths."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))} |"

    return [line(head), f"|{'|'.join('-' * (width + 2) for width in widths)}|", *map(line, rows)]


# ---- the picture ----


def plot(runs: Sequence[Run]) -> Figure:
    """A row for each loss, a column for each axis: points pale, the values of the table strong."""
    tags = shared_losses(runs)
    figure = Figure(figsize=(12, 0.6 + 3 * len(tags)), layout="constrained")
    panels = figure.subplots(len(tags), len(AXES), squeeze=False, sharey="row")
    for tag, row in zip(tags, panels, strict=True):
        for axis, panel in zip(AXES, row, strict=True):
            for number, one in enumerate(runs):
                _draw(panel, one, tag, axis, COLOURS[number % len(COLOURS)], LINES[number % len(LINES)])
            panel.set_xlabel(f"training, {axis}")
            panel.grid(alpha=0.3)
        row[0].set_ylabel(f"{tag}\n(mean squared error)")
        log_scale(row[0])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(runs), 4))
    return figure


def _draw(panel: Axes, run: Run, tag: str, axis: str, colour: str, style: str) -> None:
    steps = sorted(run.losses[tag])
    at, values = run.places(steps, axis), np.asarray([run.losses[tag][step] for step in steps])
    means = [float(np.mean(values_at(run, tag, axis, place))) for place in at]
    panel.plot(at, values, color=colour, alpha=0.25, linewidth=0.8)
    panel.plot(
        at, means, color=colour, linestyle=style, label=run.name, marker="o" if len(at) < 12 else "", markersize=3
    )
    odd = [place for place, value in zip(at, values, strict=True) if not math.isfinite(value)]
    if odd:
        top = panel.get_xaxis_transform()
        panel.plot(odd, [0.97] * len(odd), "x", color=colour, transform=top, label=f"{run.name}: not finite")
