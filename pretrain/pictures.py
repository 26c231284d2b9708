"""Tensors to pictures that people look at: labelled grids and mask maps.

Letters: K blocks, S sampling steps, N tokens; H, W pixels.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def to_image(picture_3HW: Tensor) -> Image.Image:
    """A picture in −1..1 to 8 bits."""
    bytes_HW3 = ((picture_3HW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(bytes_HW3.cpu().numpy())


def labelled_grid(
    images: Sequence[Image.Image], labels: Sequence[str], side: int = 256, columns: int | None = None
) -> Image.Image:
    """Pictures in rows, each `side` pixels wide with its label below."""
    columns = columns or min(len(images), max(1, math.ceil(math.sqrt(len(images)))))
    font = ImageFont.load_default(size=max(11, side // 20))
    line = max(11, side // 20) + 3
    lines = [textwrap.wrap(label, width=max(16, int(side / (line * 0.42))))[:3] for label in labels]
    below = line * max((len(w) for w in lines), default=0) + 8
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + below + 8) + 8), "white")
    canvas = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        x, y = 8 + (i % columns) * (side + 8), 8 + (i // columns) * (side + below + 8)
        grid.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        for k, words in enumerate(lines[i]):
            canvas.text((x, y + side + 2 + k * line), words, fill="black", font=font)
    return grid


def mask_map(masks_SKN: Tensor, grid: tuple[int, int], timesteps: Sequence[float], cell: int = 64) -> Image.Image:
    """Query masks of one picture over blocks (rows) and sampling steps (columns); bright tokens query the FFN more.

    At most 8 steps are shown, evenly spread. The scale is black 0 to white 1.
    """
    steps, blocks, _ = masks_SKN.shape
    shown = np.unique(np.linspace(0, steps - 1, min(8, steps)).round().astype(int))
    left, top, gap = 70, 22, 3
    size = (left + len(shown) * (cell + gap), top + blocks * (cell + gap))
    picture = Image.new("RGB", size, "white")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for column, step in enumerate(shown):
        canvas.text((left + column * (cell + gap), 4), f"t {timesteps[step]:.0f}", fill="black", font=font)
        for block in range(blocks):
            values = masks_SKN[step, block].float().clamp(0, 1).reshape(grid).cpu().numpy()
            tile = Image.fromarray((values * 255).astype(np.uint8)).resize((cell, cell), Image.Resampling.NEAREST)
            picture.paste(tile.convert("RGB"), (left + column * (cell + gap), top + block * (cell + gap)))
    for block in range(blocks):
        canvas.text((4, top + block * (cell + gap) + cell // 2 - 6), f"block {block}", fill="black", font=font)
    return picture
