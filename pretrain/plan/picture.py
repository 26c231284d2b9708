"""The picture of a sweep: time, efficiency, cost and goodput over the number of GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from PIL import Image

from pretrain.plan.sweep import Point, finite
from pretrain.sampling.plots import to_picture

# Of Okabe and Ito's palette, which the colour-blind tell apart; markers and dashes say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dv*"


def draw(points: Sequence[Point]) -> Image.Image:
    """Four panels with a line for each stage: whole with overlap, dashed without."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    money = points[0].money is not None
    cost = "cost (GPU-hours × price)" if money else "GPU-hours"
    for panel, label in zip(panels, ("time (hours)", "efficiency (%)", cost, "goodput (%)"), strict=True):
        panel.set(xlabel="number of GPUs", ylabel=label, xscale="log")
        panel.grid(alpha=0.3)
        counts = sorted({p.gpus for p in points})
        panel.set_xticks(counts, [f"{n:,}" for n in counts])
        panel.xaxis.set_minor_locator(NullLocator())
    names = list(dict.fromkeys(p.stage for p in points))
    for number, name in enumerate(names):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for overlap in (True, False):
            line = [p for p in points if p.stage == name and p.overlap == overlap]
            style = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "-" if overlap else "--"}
            style["label"] = name if overlap else f"{name}, without overlap"
            gpus = [p.gpus for p in line]
            columns = (
                [p.hours for p in line],
                [100 * p.efficiency for p in line],
                [p.gpu_hours if p.money is None else p.money for p in line],
                [100 * p.goodput for p in line],
            )
            for panel, values in zip(panels, columns, strict=True):
                panel.plot(gpus, finite(values), **style)
    _scales(panels)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(3, len(names)))
    return to_picture(figure)


def _scales(panels: Sequence[Axes]) -> None:
    time, efficiency, cost, goodput = panels
    time.set_yscale("log")
    time.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    cost.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    cost.set_ylim(bottom=0)
    for panel in (efficiency, goodput):
        panel.set_ylim(0, 103)
