"""Query masks over blocks and timesteps (FocusDiT, Fig. 5): means, spread, and the share under the paper's skip threshold.

All are over the tokens of all pictures, of the half of guidance that has the caption. `masks.csv` has a line for each block and
step; `masks_map.png` has the masks of the first picture laid on it.

Letters: B pictures, S sampling steps, K blocks, N tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from data_prep.common.paths import path
from data_prep.encoders import DOWNSAMPLE
from pretrain.analyze.subject import drawing_arguments, read_subject, write
from pretrain.models.focusdit.skip import LOW
from pretrain.sampling.jobs import write_png
from pretrain.sampling.pictures import mask_map
from pretrain.sampling.plots import to_picture

HEADER = ("block", "timestep", "mean", "std", "share_under_0.15", "tokens")


class Masks:
    """Sums over tokens and pictures, by step and block [S, K] in fp64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None

    def add(self, masks_BSKN: Tensor) -> None:
        """Adds some pictures."""
        m = masks_BSKN.double()
        # A mask that is NaN is not under the threshold; its mean says that it is there.
        some = torch.stack([values.sum((0, 3)) for values in (m, m**2, (m < LOW).double())])
        self.sums = some if self.sums is None else self.sums + some
        self.count += m.shape[0] * m.shape[3]

    def figures(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, standard deviation, and the share under LOW (NaN where the mean is), each [S, K]."""
        assert self.sums is not None
        mean, square, low = self.sums / self.count
        std = (square - mean**2).clamp(min=0).sqrt()
        return mean, std, low.masked_fill(mean.isnan(), float("nan"))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--run", type=path, required=True, help="run directory of a model with query masks")
    drawing_arguments(parser, pictures=100)


def run(args: argparse.Namespace) -> str:
    """Draws and averages; writes figure and table. Returns a closing text."""
    subject = read_subject(args, args.run, args.run.name)
    masks, picture = Masks(), None
    for output in subject.draw(decoded=1, masks=True):
        assert output.query_masks is not None
        masks.add(output.query_masks)
        if picture is None:
            picture, of_picture_SKN = output.images[0], output.query_masks[0]
    assert isinstance(picture, Image.Image)
    mean_SK, std_SK, low_SK = masks.figures()
    timesteps, out = subject.timesteps, args.out or args.run / "analyze"
    table = [
        [k, timesteps[s], mean_SK[s, k].item(), std_SK[s, k].item(), low_SK[s, k].item(), masks.count]
        for k in range(mean_SK.shape[1])
        for s in range(len(timesteps))
    ]
    closing = write(out, "masks", plot(mean_SK, std_SK, low_SK, timesteps), HEADER, table)
    unit = DOWNSAMPLE * subject.dit.config.patch
    grid = (picture.height // unit, picture.width // unit)
    write_png(mask_map(of_picture_SKN, grid, timesteps, picture), out / "masks_map.png")
    by_block, by_step = mean_SK.mean(0), mean_SK.mean(1)
    return (
        f"means by block {by_block.min():.3f} to {by_block.max():.3f}, by step {by_step.min():.3f} to {by_step.max():.3f}\n"
        f"{closing}, and masks_map.png"
    )


def plot(mean_SK: Tensor, std_SK: Tensor, low_SK: Tensor, timesteps: Sequence[float]) -> Image.Image:
    """Three maps over blocks and timesteps; NaN is grey."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    steps = len(timesteps)
    shown = sorted({round(i * (steps - 1) / 7) for i in range(8)})
    titles = ("mean", "standard deviation over tokens", f"tokens under {LOW} (%)")
    for panel, title, values, top in zip(panels, titles, (mean_SK, std_SK, 100 * low_SK), (1, None, 100), strict=True):
        image = panel.imshow(
            values.numpy(), vmin=0, vmax=top, aspect="auto", cmap=colormaps["cividis"].with_extremes(bad="0.6")
        )
        panel.set(title=title, xlabel="block")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=panel)
    figure.suptitle("query mask")
    panels[0].set_ylabel("timestep (1000 is noise)")
    panels[0].set_yticks(shown, [f"{timesteps[step]:.0f}" for step in shown])
    return to_picture(figure)
