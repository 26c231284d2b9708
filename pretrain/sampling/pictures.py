"""Pictures that people look at: pairs and mask maps; data_prep/pictures/grids.py has the labelled grids.

Letters: K blocks, S sampling steps, N tokens; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_prep.pictures.grids import labelled_grid


def side_by_side(
    left: Sequence[Image.Image],
    right: Sequence[Image.Image],
    titles: tuple[str, str],
    labels: Sequence[str],
    side: int = 192,
) -> Image.Image:
    """Pairs of pictures, `left` and `right` of each next to each other, in rows of two pairs."""
    pairs = [image for pair in zip(left, right, strict=True) for image in pair]
    captions = [f"{title}: {label}" for label in labels[: len(left)] for title in titles]
    return labelled_grid(pairs, captions, side, columns=4)


def mask_map(
    masks_SKN: Tensor,
    grid: tuple[int, int],
    timesteps: Sequence[float],
    picture: Image.Image | None = None,
    cell: int = 64,
) -> Image.Image:
    """Query masks of one picture over blocks (rows) and sampling steps (columns), as in the paper's Fig. 5.

    At most 8 steps are shown, evenly spread; yellow tokens query the FFN fully (1), dark blue ones not at all (0). With the
    `picture`, the masks lie on top of it.
    """
    steps, blocks, _ = masks_SKN.shape
    shown = np.unique(np.linspace(0, steps - 1, min(8, steps)).round().astype(int))
    left, top, gap = 70, 22, 3
    tile_size = (
        (round(cell * grid[1] / grid[0]), cell) if grid[0] > grid[1] else (cell, round(cell * grid[0] / grid[1]))
    )
    across, down = tile_size[0] + gap, tile_size[1] + gap
    sheet = Image.new("RGB", (left + len(shown) * max(across, 40), top + blocks * down), "white")
    across = max(across, 40)
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    below = None if picture is None else picture.convert("L").convert("RGB").resize(tile_size)
    for column, step in enumerate(shown):
        canvas.text((left + column * across, 4), f"t {timesteps[step]:.0f}", fill="black", font=font)
        for block in range(blocks):
            tile = _heat(masks_SKN[step, block].reshape(grid)).resize(tile_size, Image.Resampling.NEAREST)
            if below is not None:
                tile = Image.blend(below, tile, 0.6)
            sheet.paste(tile, (left + column * across, top + block * down))
    for block in range(blocks):
        canvas.text((4, top + block * down + tile_size[1] // 2 - 6), f"block {block}", fill="black", font=font)
    return sheet


def _heat(values_HW: Tensor) -> Image.Image:
    """Values in 0..1 as colours, dark blue to yellow."""
    from matplotlib import colormaps  # late: it takes a training's start a third of a second

    colours_HW4 = colormaps["viridis"](values_HW.float().clamp(0, 1).cpu().numpy(), bytes=True)
    return Image.fromarray(colours_HW4[..., :3])
