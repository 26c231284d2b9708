"""An FFN's natural mask beside the learned one (FocusDiT, Fig. 6): how smooth each is, and how it follows the picture's edges.

The natural mask of a token is the share of the block's entries that it activates (R_utilize); the learned one is its query mask.
Two figures of each mask, by picture, block and step, then in the mean over pictures:

- smoothness: Moran's I over neighbouring tokens (above, below, left, right), 1 for a smooth mask, about 0 for a random one,
  below 0 for a chequered one; independent of a mask's level and spread;
- edge correlation: Pearson's, over tokens, with the strength of edges in the finished picture (the gradient of its brightness,
  in the mean over a token's pixels).

A mask that is the same for all tokens of a picture has neither: then the mean is NaN, too, and `undefined` counts such pictures.

Letters: B pictures, S sampling steps, K blocks, N tokens of (rows, columns) R, C; H, W pixels.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from data_prep.common.paths import path
from data_prep.encoders import DOWNSAMPLE
from pretrain.analyze.subject import Subject, drawing_arguments, read_subject, write
from pretrain.models.grids import Grid, pool, spread
from pretrain.sampling.plots import COLOURS, LINES, to_picture

KINDS = ("natural", "learned")
SHOWN = 6  # blocks of the figure
HEADER = ("mask", "block", "timestep", "mean", "smoothness", "edge_correlation", "undefined", "pictures")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--run", type=path, required=True, help="run directory of a model with query masks")
    parser.add_argument("--timestep", type=float, default=500, help="the masks of the nearest sampling step are shown")
    drawing_arguments(parser, pictures=16)


@dataclass(frozen=True)
class Masks:
    """Both masks of some pictures, each [B, S, K, N], on the grid of all tokens; the pictures' edges [B, N]."""

    natural: Tensor
    learned: Tensor
    edges: Tensor
    grid: Grid
    pictures: list[Image.Image]


def run(args: argparse.Namespace) -> str:
    """Draws and measures; writes figure and table. Returns a closing text."""
    subject = read_subject(args, args.run, args.run.name)
    sums: dict[str, Tensor] = {}
    first = None
    for masks in draw(subject):
        for kind in KINDS:
            some = figures(getattr(masks, kind), masks.edges, masks.grid).sum(1)
            sums[kind] = sums.get(kind, 0) + some
        first = first or masks
    assert first is not None
    count, timesteps = len(subject.prompts), subject.timesteps
    means = {kind: torch.cat([sums[kind][:3] / count, sums[kind][3:]]) for kind in KINDS}
    table = [
        [kind, k, timesteps[s], *means[kind][:3, s, k].tolist(), int(means[kind][3, s, k]), count]
        for kind in KINDS
        for k in range(means[kind].shape[2])
        for s in range(len(timesteps))
    ]
    step = min(range(len(timesteps)), key=lambda s: abs(timesteps[s] - args.timestep))
    picture = plot(first, means, step, timesteps[step])
    closing = write(args.out or args.run / "analyze", "natural_mask", picture, HEADER, table)
    said = [
        f"{kind}: smoothness {means[kind][1].mean():.3f}, edge correlation {means[kind][2].mean():.3f}, "
        "in the mean over blocks and steps"
        for kind in KINDS
    ]
    return "\n".join([*said, closing])


def draw(subject: Subject) -> Iterator[Masks]:
    """Draws the prompts; gives each batch's masks and pictures."""
    shares: dict[int, list[tuple[Tensor, Grid]]] = defaultdict(list)

    def receive(block: int, keys_BNC: Tensor, grid: Grid) -> None:
        share_BN = (keys_BNC > 0).float().mean(-1)
        shares[block].append((share_BN.masked_fill(keys_BNC.isnan().any(-1), float("nan")).cpu(), grid))

    unit = DOWNSAMPLE * subject.dit.config.patch
    for output in subject.draw(decoded=len(subject.prompts), masks=True, receive=receive):
        pictures, learned = list(output.images), output.query_masks
        assert learned is not None
        grid = (pictures[0].height // unit, pictures[0].width // unit)
        natural = torch.full_like(learned, float("nan"))  # as it stays where a block's FFN was pruned away
        for block, steps in shares.items():
            maps = [spread(share_BN[..., None], cells, grid)[..., 0] for share_BN, cells in steps]
            natural[:, :, block] = torch.stack(maps, dim=1)
        shares.clear()
        yield Masks(natural, learned, torch.stack([edges(picture, grid) for picture in pictures]), grid, pictures)


# ---- the figures ----


def edges(picture: Image.Image, grid: Grid) -> Tensor:
    """Strength of the edges in a picture, [N] in fp64: the gradient of its brightness (0..1), in the mean over a token."""
    brightness_HW = np.asarray(picture.convert("L"), dtype=float) / 255
    strength_HW = torch.from_numpy(np.hypot(*np.gradient(brightness_HW)))
    return pool(strength_HW.reshape(1, -1, 1), tuple(strength_HW.shape), grid).flatten()  # type: ignore[arg-type]


def figures(masks_BSKN: Tensor, edges_BN: Tensor, grid: Grid) -> Tensor:
    """Mean, smoothness, edge correlation, and 1 where one of these two is undefined: [4, B, S, K] in fp64."""
    masks = masks_BSKN.double()
    smooth, along = smoothness(masks, grid), correlation(masks, edges_BN.double()[:, None, None])
    return torch.stack([masks.mean(-1), smooth, along, (smooth + along).isnan().double()])


def smoothness(values_XN: Tensor, grid: Grid) -> Tensor:
    """Moran's I of maps [..., N] over pairs of neighbours in a row or a column; NaN for a constant map."""
    x_XRC = centred(values_XN).unflatten(-1, grid)
    rows, columns = grid
    pairs = rows * (columns - 1) + (rows - 1) * columns
    beside = (x_XRC[..., 1:] * x_XRC[..., :-1]).sum((-2, -1)) + (x_XRC[..., 1:, :] * x_XRC[..., :-1, :]).sum((-2, -1))
    return rows * columns / pairs * beside / (x_XRC**2).sum((-2, -1))


def correlation(values_XN: Tensor, others_XN: Tensor) -> Tensor:
    """Pearson's correlation over the last axis; NaN where one is constant."""
    x, y = centred(values_XN), centred(others_XN)
    return (x * y).sum(-1) / ((x**2).sum(-1) * (y**2).sum(-1)).sqrt()


def centred(values_XN: Tensor) -> Tensor:
    """Values less their mean; exactly 0 for constant ones, whatever their mean rounds to."""
    constant = values_XN.amax(-1, keepdim=True) == values_XN.amin(-1, keepdim=True)
    return (values_XN - values_XN.mean(-1, keepdim=True)).masked_fill(constant, 0)


# ---- the picture ----


def plot(first: Masks, means: dict[str, Tensor], step: int, timestep: float) -> Image.Image:
    """The first picture's masks of some blocks at one step, each in the range of its own values; below, the figures by block."""
    blocks = first.learned.shape[2]
    shown = sorted({round(i * (blocks - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    figure = Figure(figsize=(1.75 * (len(shown) + 1), 7.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1), squeeze=False)[:, 0]
    panels = above.subplots(2, len(shown) + 1)
    above.suptitle(f"masks of the first picture at timestep {timestep:.0f} (1000 is noise), light: high")
    panels[0, 0].imshow(first.pictures[0])
    panels[0, 0].set_title("picture", fontsize=9)
    panels[1, 0].imshow(first.edges[0].unflatten(-1, first.grid), cmap="cividis")
    panels[1, 0].set_title("its edges", fontsize=9)
    for row, kind in zip(panels[:, 1:], KINDS, strict=True):
        for panel, block in zip(row, shown, strict=True):
            map_N = getattr(first, kind)[0, step, block]
            panel.imshow(map_N.unflatten(-1, first.grid), cmap="cividis")
            panel.set_title(f"{kind}, block {block}\n{map_N.min():.3f} to {map_N.max():.3f}", fontsize=8)
    for panel in panels.ravel():
        panel.set_axis_off()
    left, right = below.subplots(1, 2)
    for number, kind in enumerate(KINDS):
        style: dict[str, Any] = {"color": COLOURS[number], "linestyle": LINES[number], "label": f"{kind} mask"}
        _draw(left, means[kind][1], style)
        _draw(right, means[kind][2], style)
    left.set(title="smoothness", ylabel="Moran's I (1: smooth, 0: random)")
    right.set(title="edge correlation", ylabel="Pearson's r with the picture's edges")
    left.legend()
    return to_picture(figure)


def _draw(panel: Axes, figure_SK: Tensor, style: dict[str, Any]) -> None:
    """A figure by block: the mean over steps, and the range of the steps."""
    blocks = range(figure_SK.shape[1])
    panel.plot(blocks, figure_SK.mean(0), marker="o", markersize=3, **style)
    panel.fill_between(blocks, figure_SK.amin(0), figure_SK.amax(0), color=style["color"], alpha=0.15, linewidth=0)
    panel.set_xlabel("block (band: over the timesteps)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
