"""Labelled grids of decoded pictures. Letters: H, W pixels."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor


def to_image(picture_3HW: Tensor) -> Image.Image:
    """Converts a picture in −1..1 to an 8-bit image."""
    bytes_HW3 = ((picture_3HW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(bytes_HW3.cpu().numpy())


def label_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans of matplotlib: it has Latin with all accents, Greek and Cyrillic, where Pillow's own font has ASCII alone."""
    from matplotlib import get_data_path  # late, as it takes half a second

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def labelled_grid(
    images: Sequence[Image.Image], labels: Sequence[str], side: int = 256, columns: int | None = None
) -> Image.Image:
    """Draws pictures in rows, each `side` pixels wide with its label below; `columns` is about the root of their number."""
    columns = columns or min(len(images), max(1, math.ceil(math.sqrt(len(images)))))
    font = label_font(max(11, side // 20))
    line = max(11, side // 20) + 3
    lines = [textwrap.wrap(label, width=max(16, int(side / (line * 0.42))))[:3] for label in labels]
    below = line * max((len(w) for w in lines), default=0) + 8
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + below + 8) + 8), "white")
    canvas = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        x, y = 8 + (i % columns) * (side + 8), 8 + (i // columns) * (side + below + 8)
        grid.paste(ImageOps.pad(image, (side, side), Image.Resampling.LANCZOS, color="white"), (x, y))
        for k, words in enumerate(lines[i]):
            canvas.text((x, y + side + 2 + k * line), words, fill="black", font=font)
    return grid
