"""Plot of an evaluation's results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from pretrain.sampling.plots import COLOURS


def plot_results(results: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for each metric, a bar for each of its figures with the value beside it; the line is ± SEM."""
    heights = [len(result["values"]) + 1.5 for result in results]
    figure = Figure(figsize=(9, 0.28 * sum(heights) + 0.3), layout="constrained")
    panels = figure.subplots(len(results), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, result in zip(panels, results, strict=True):
        names, values = list(result["values"]), list(result["values"].values())
        shown = [0.0 if math.isnan(v["value"]) else v["value"] for v in values]
        sems = [v["sem"] or 0.0 for v in values]
        panel.barh(names, shown, xerr=sems, color=COLOURS[0], height=0.7, error_kw={"ecolor": "black", "capsize": 3})
        labels = [f"{v['value']:.4g}" + (f" ± {v['sem']:.2g}" if v["sem"] else "") for v in values]
        for row, (at, sem, label) in enumerate(zip(shown, sems, labels, strict=True)):
            panel.text(max(at + sem, 0.0), row, f"  {label}", va="center", fontsize=9)
        panel.set_title(f"{result['metric']}, {result['pictures']['count']} pictures", loc="left", fontsize=10)
        panel.invert_yaxis()
        panel.margins(x=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    return figure
