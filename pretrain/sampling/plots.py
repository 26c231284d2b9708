"""Figures as pictures: matplotlib without a display.

Letters: S sampling steps, K blocks.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from torch import Tensor

# Okabe and Ito's colours, which the colour-blind tell apart, but for their yellow, which white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")  # beside the colours, for print in grey


def to_picture(figure: Figure) -> Image.Image:
    """A figure as an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer).convert("RGB")


def log_scale(panel: Axes) -> None:
    """Gives a panel a logarithmic y axis, with its numbers written out at 1, 2 and 5."""
    panel.set_yscale("log")
    panel.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())


def plot_mask_means(means_SK: Tensor, timesteps: Sequence[float], removed: Sequence[int]) -> Image.Image:
    """Mean query mask by block and step, and by block with the removed FFNs marked (FocusDiT, Fig. 10)."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    heat, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    steps, blocks = means_SK.shape
    shown = heat.imshow(means_SK.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
    heat.set(title="mean query mask", xlabel="block", ylabel="timestep")
    rows = sorted({round(i * (steps - 1) / 7) for i in range(8)})
    heat.set_yticks(rows, [f"{timesteps[row]:.0f}" for row in rows])
    heat.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(shown, ax=heat)
    colours = [COLOURS[1] if block in removed else COLOURS[0] for block in range(blocks)]
    bars.bar(range(blocks), means_SK.mean(0).tolist(), color=colours)
    bars.set(title="over all steps (orange: FFN removed)", xlabel="block", ylim=(0, 1))
    bars.xaxis.set_major_locator(MaxNLocator(integer=True))
    return to_picture(figure)


@dataclass(frozen=True)
class SkipPoint:
    """One threshold: seconds, share of the FFNs' FLOPs that were saved, and the latents' deviation from no skipping.

    `saved_SK` are the FLOPs saved at each step and block.
    """

    threshold: float
    seconds: float
    saved: float
    deviation: float
    saved_SK: Tensor


def plot_skip(curves: Mapping[str, Sequence[SkipPoint]]) -> Image.Image:
    """Time, saved FFN FLOPs and deviation over the threshold, by unit (FocusDiT, Fig. 9)."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for number, (unit, points) in enumerate(curves.items()):
        thresholds = [p.threshold for p in points]
        columns = ([p.seconds for p in points], [100 * p.saved for p in points], [p.deviation for p in points])
        style = {"color": COLOURS[number], "linestyle": LINES[number], "marker": "os"[number], "label": f"by {unit}"}
        for panel, values in zip(panels, columns, strict=True):
            panel.plot(thresholds, values, **style)
    labels = ("time (s)", "FLOPs of the FFNs saved (%)", "relative deviation of the latents")
    for panel, label in zip(panels, labels, strict=True):
        panel.set(ylabel=label, xlabel="threshold of the query mask")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].legend()
    return to_picture(figure)
