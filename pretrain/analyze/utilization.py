"""Use of the FFN vocabulary (FocusDiT, Fig. 2 and 7): how many entries each token activates, and how many tokens each entry.

R_utilize is the share of a block's entries that a token activates, R_retrieve the share of tokens that activate an entry: over
all pictures and sampling steps, of the half of guidance that has the caption. `utilization.csv` has a line for each run, block
and ratio: the mean, which both ratios share, the standard deviation, of entries the share that under 1% of the tokens activate
(`seldom`), and the sorted values at each hundredth of the tokens or entries, the highest first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from data_prep.common.paths import distinct_names, path
from pretrain.analyze.activations import Tally
from pretrain.analyze.subject import Subject, drawing_arguments, read_subject, write
from pretrain.models.grids import Grid
from pretrain.sampling.plots import COLOURS, LINES, to_picture

SHARES = [i / 100 for i in range(101)]
SELDOM = 0.01  # of the tokens
HEADER = (
    "run",
    "block",
    "entries",
    "tokens",
    "ratio",
    "mean",
    "std",
    "seldom",
    *(f"sorted_{i:03d}" for i in range(101)),
)


@dataclass(frozen=True)
class Counted:
    """A run's tallies by block; a block without FFN has none."""

    name: str
    tallies: dict[int, Tally]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--run", type=path, nargs="+", required=True, help="run directories, such as baseline and FocusDiT"
    )
    parser.add_argument("--label", nargs="+", help="a name of each run for the figure (default: its folder's)")
    drawing_arguments(parser, pictures=100)


def run(args: argparse.Namespace) -> str:
    """Draws and counts; writes figure and table. Returns a closing text."""
    names = args.label or distinct_names(args.run)
    if len(set(names)) != len(args.run):
        raise ValueError(f"--label {' '.join(names)}: expected a different name for each of {len(args.run)} runs")
    runs = [count(read_subject(args, one, name, needs_masks=False)) for one, name in zip(args.run, names, strict=True)]
    out = args.out or args.run[0] / "analyze"
    closing = write(out, "utilization", plot(runs), HEADER, [row for one in runs for row in rows(one)])
    means = [
        f"{one.name}: {100 * overall(one):.1f}% of the entries are activated, in the mean over blocks" for one in runs
    ]
    return "\n".join([*means, closing])


def count(subject: Subject) -> Counted:
    """Draws a run's pictures and counts what their tokens activate."""
    tallies: dict[int, Tally] = {}

    def receive(block: int, keys_BNC: Tensor, grid: Grid) -> None:
        if block not in tallies:
            tallies[block] = Tally(keys_BNC.shape[-1], keys_BNC.device)
        tallies[block].add(keys_BNC)

    for _ in subject.draw(receive=receive):
        pass
    return Counted(subject.name, tallies)


def rows(run: Counted) -> list[list[object]]:
    """The lines of a run for the table."""
    found: list[list[object]] = []
    for block, tally in sorted(run.tallies.items()):
        for ratio, (values, mean, std) in {
            "utilize": tally.utilize(SHARES),
            "retrieve": tally.retrieve(SHARES),
        }.items():
            seldom = tally.seldom(SELDOM) if ratio == "retrieve" else ""
            found.append([run.name, block, len(tally.by_entry), tally.tokens, ratio, mean, std, seldom, *values])
    return found


def overall(run: Counted) -> float:
    """The mean of both ratios, in the mean over blocks."""
    means = [tally.utilize([])[1] for tally in run.tallies.values()]
    return sum(means) / len(means)


# ---- the picture ----


def plot(runs: Sequence[Counted]) -> Image.Image:
    """Sorted curves of each block by run; beside them, by block, mean and spread, and the entries that are seldom retrieved."""
    figure = Figure(figsize=(3.6 * (len(runs) + 1) + 0.8, 6.4), layout="constrained")
    panels = figure.subplots(2, len(runs) + 1, squeeze=False)
    last = max(block for run in runs for block in run.tallies)
    scale, colours = Normalize(0, max(last, 1)), colormaps["cividis"]
    for column, run in enumerate(runs):
        for block, tally in sorted(run.tallies.items()):
            for panel, values in (
                (panels[0, column], tally.utilize(SHARES)[0]),
                (panels[1, column], tally.retrieve(SHARES)[0]),
            ):
                panel.plot(
                    [100 * s for s in SHARES], [100 * v for v in values], color=colours(scale(block)), linewidth=1.2
                )
        panels[0, column].set(title=run.name, xlabel="tokens, sorted (%)", ylabel="R_utilize (% of the entries)")
        panels[1, column].set(xlabel="entries, sorted (%)", ylabel="R_retrieve (% of the tokens)")
        for panel in panels[:, column]:
            panel.set(xlim=(0, 100), ylim=(0, 100))
    figure.colorbar(ScalarMappable(scale, colours), ax=panels[:, -2], label="block", ticks=MaxNLocator(integer=True))
    for number, run in enumerate(runs):
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)], "label": run.name}
        blocks, tallies = zip(*sorted(run.tallies.items()), strict=True)
        figures = [tally.utilize([]) for tally in tallies]
        panels[0, -1].errorbar(
            blocks,
            [100 * m for _, m, _ in figures],
            [100 * s for _, _, s in figures],
            marker="o",
            markersize=3,
            capsize=2,
            **style,
        )
        panels[1, -1].plot(blocks, [100 * tally.seldom(SELDOM) for tally in tallies], marker="o", markersize=3, **style)
    panels[0, -1].set(title="mean over tokens, ± std", xlabel="block", ylabel="R_utilize (% of the entries)")
    panels[1, -1].set(
        title=f"entries with R_retrieve < {100 * SELDOM:g}%", xlabel="block", ylabel="share of the entries (%)"
    )
    panels[0, -1].legend()
    for panel in panels[:, -1]:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylim(bottom=0)
    for panel in panels.ravel():
        panel.grid(alpha=0.3)
    return to_picture(figure)
