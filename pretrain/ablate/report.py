"""A study's table, with means over seeds, and its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from data_prep.common.files import atomic_write
from pretrain.ablate.statistics import mean_and_sem, paired
from pretrain.ablate.study import Study
from pretrain.sampling.plots import to_picture

Cells = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""The cells that are done, by row and seed."""


def figures_of(cells: Cells) -> list[str]:
    """The names of all figures, in the order in which they come."""
    return list(dict.fromkeys(name for row in cells.values() for cell in row.values() for name in cell["figures"]))


def values(cells: Cells, row: str, figure: str) -> dict[int, float]:
    """A figure of a row by seed."""
    return {seed: cell["figures"][figure] for seed, cell in cells.get(row, {}).items() if figure in cell["figures"]}


def table(study: Study, cells: Cells) -> str:
    """Means ± SEM over seeds; below, each row against the one that it builds on, paired by seed."""
    names = figures_of(cells)
    papers = list(dict.fromkeys(key for row in study.rows.values() for key in row.paper))
    steps = any(row.equal != "images" for row in study.rows.values())
    head = [
        "row",
        "",
        "parameters",
        "FLOPs",
        "step",
        *(["steps"] if steps else []),
        *names,
        *(f"paper's {key}" for key in papers),
    ]
    lines = [_line(head), _line(["---"] * len(head))]
    base = next((c for name in study.rows for c in cells.get(name, {}).values()), None)
    for name, row in study.rows.items():
        if not cells.get(name):
            continue
        cell = next(iter(cells[name].values()))
        assert base is not None
        costs = [f"{cell['parameters'] / 1e6:.2f}M", f"{cell['flops'] / base['flops']:.2f}", _ratio(cells, name, study)]
        costs += [f"{sum(c['steps'] for c in cells[name].values()) / len(cells[name]):.0f}"] if steps else []
        found = [_mean(list(values(cells, name, figure).values())) for figure in names]
        lines.append(_line([name, row.label, *costs, *found, *(_paper(row.paper, key) for key in papers)]))
    return "\n".join([*lines, "", *_comparisons(study, cells, names)])


def _comparisons(study: Study, cells: Cells, names: Sequence[str]) -> list[str]:
    lines = [_line(["row", "against", "figure", "difference", "p", "seeds"]), _line(["---"] * 6)]
    for name, row in study.rows.items():
        if row.before is None:
            continue
        for figure in names:
            own, before = values(cells, name, figure), values(cells, row.before, figure)
            seeds = sorted(own.keys() & before.keys())
            if len(seeds) < 2:
                continue
            d = paired([own[s] for s in seeds], [before[s] for s in seeds])
            lines.append(
                _line([name, row.before, figure, f"{d.mean:+.4f} ± {d.sem:.4f}", f"{d.p:.3f}", str(len(seeds))])
            )
    return lines if len(lines) > 2 else []


def _ratio(cells: Cells, name: str, study: Study) -> str:
    """The row's time for a step, as a share of the first row's with the same seed."""
    first = next(row for row in study.rows if row in cells)
    ratios = [
        cell["step_s"] / cells[first][seed]["step_s"]
        for seed, cell in cells[name].items()
        if seed in cells[first] and cell["step_s"] and cells[first][seed]["step_s"]
    ]
    return f"{sorted(ratios)[len(ratios) // 2]:.2f}" if ratios else ""


def _mean(found: Sequence[float]) -> str:
    if not found:
        return ""
    mean, sem = mean_and_sem(found)
    return f"{mean:.4f}" if math.isnan(sem) else f"{mean:.4f} ± {sem:.4f}"


def _paper(figures: Mapping[str, float], key: str) -> str:
    return f"{figures[key]:.2f}" if key in figures else ""


def _line(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |"


def plot(study: Study, cells: Cells, path: Path) -> None:
    """Writes a panel for each figure: the rows' seeds as points, their mean as a bar, that of the first row as a line."""
    names = figures_of(cells)
    rows = [row for row in study.rows if cells.get(row)]
    figure = Figure(
        figsize=(1.2 + 0.55 * len(rows) * min(len(names), 3), 3.2 * -(-len(names) // 3)), layout="constrained"
    )
    panels = figure.subplots(-(-len(names) // 3), min(len(names), 3), squeeze=False).ravel()
    for panel, name in zip(panels, names, strict=False):
        for place, row in enumerate(rows):
            found = list(values(cells, row, name).values())
            if found:
                panel.plot([place - 0.3, place + 0.3], [sum(found) / len(found)] * 2, color="black")
                panel.plot([place] * len(found), found, "o", color="tab:blue", alpha=0.7)
                if place == 0:
                    panel.plot([0, len(rows) - 1], [sum(found) / len(found)] * 2, "--", color="0.5", linewidth=0.8)
        panel.set(title=name)
        panel.set_xticks(range(len(rows)), rows, rotation=45, ha="right", rotation_mode="anchor")
        panel.grid(axis="y", alpha=0.3)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    to_picture(figure).save(path)


def write(study: Study, cells: Cells, out: Path) -> str:
    """Writes table.md and table.png; returns the table."""
    text = table(study, cells)
    atomic_write(out / "table.md", text + "\n")
    plot(study, cells, out / "table.png")
    return text
