"""Embeddings that enter the blocks: patches, the time, the text, and the positions of the tokens.

Letters: B images, C latent channels, N tokens, D width, M text tokens, E the text encoder's width, d a head's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.models.grids import Grid, centres


class PatchEmbed(nn.Module):
    """Latents [B, C, H·p, W·p] to tokens [B, H·W, D]: a p×p convolution of stride p, written as a linear map."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch * patch, width)

    def forward(self, latent_BCHW: Tensor) -> Tensor:
        p = self.patch
        return self.proj(rearrange(latent_BCHW, "B C (H p) (W q) -> B (H W) (C p q)", p=p, q=p))


class TimeEmbed(nn.Module):
    """Timesteps [B] in 0..1000 to [B, D]: 256 sinusoids (cosines first), Linear, SiLU, Linear."""

    frequencies = 256

    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(self.frequencies, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep_B: Tensor) -> Tensor:
        half = self.frequencies // 2
        exponent = -math.log(10000) * torch.arange(half, device=timestep_B.device, dtype=torch.float32) / half
        angle = timestep_B.float()[:, None] * exponent.exp()
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(wave)))


class TextProjection(nn.Module):
    """Text embeddings [M, E] to the backbone's width [M, D]: Linear, GELU (tanh), Linear."""

    def __init__(self, text_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(text_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, tokens_ME: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(tokens_ME), approximate="tanh"))


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (arXiv 2104.09864): cosines and signed sines [N, d] (or [B, 1, N, d], each image's own), for queries
    and keys [B, h, N, d]."""

    cos_Nd: Tensor
    sin_Nd: Tensor
    parts: int

    def turn(self, x_BhNd: Tensor) -> Tensor:
        # Rotate-half inside each of the head's parts; the sine's sign is already in the table.
        swapped = rearrange(x_BhNd, "B h N (part two k) -> B h N part two k", part=self.parts, two=2).flip(-2)
        return torch.addcmul(x_BhNd * self.cos_Nd, swapped.flatten(-3), self.sin_Nd)

    def take(self, places_Bn: Tensor) -> Rotary:
        """The positions of some tokens of each image, by their places among the N."""
        return Rotary(self.cos_Nd[places_Bn][:, None], self.sin_Nd[places_Bn][:, None], self.parts)


# Positions are divided by it: one number, or one for rows and one for columns.
Scale = float | tuple[float, float]


def grid_coordinates(
    grid: Grid, scale: Scale, device: torch.device, cells: Grid | None = None
) -> tuple[Tensor, Tensor]:
    """Row and column [N] of each token of a grid of (rows, columns), or of its cells' centres, divided by `scale`."""
    scales = scale if isinstance(scale, tuple) else (scale, scale)
    rows, columns = (centres(g, c, device) / s for g, c, s in zip(grid, cells or grid, scales, strict=True))
    row_N, column_N = torch.meshgrid(rows, columns, indexing="ij")
    return row_N.flatten(), column_N.flatten()


def sincos_positions(grid: Grid, width: int, scale: Scale, device: torch.device, dtype: torch.dtype) -> Tensor:
    """PixArt-alpha's absolute positions [N, D], to be added to the tokens: sines and cosines of the row, then the column."""
    frequency = 10000 ** -(torch.arange(width // 4, device=device, dtype=torch.float32) / (width // 4))
    angles = [c[:, None] * frequency for c in grid_coordinates(grid, scale, device)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=-1).to(dtype)


# The coordinates that each part of a head's width turns by.
ROTARY_PARTS = {
    "halves": ("row", "column"),
    "thirds": ("time", "row", "column"),
    "release": ("time", "row", "column"),
}


def rotary_positions(
    layout: str,
    grid: Grid,
    head_width: int,
    scale: Scale,
    device: torch.device,
    dtype: torch.dtype,
    cells: Grid | None = None,
) -> Rotary:
    """Positions of a grid of (rows, columns) tokens, or of its cells.

    Args:
        layout: "halves" (row, column), "thirds" (time, row, column, where an image's time is 0), or "release": thirds whose
            angles are rounded to `dtype` before cosine and sine, as the authors' code has them.
        head_width: d; must be divisible by twice the layout's parts.
        scale: positions are divided by it. With 2, a 512 px grid spans the positions that 256 px training saw.
        cells: (rows, columns) of a coarser grid over the same tokens, whose centres are asked for.
    """
    parts = ROTARY_PARTS[layout]
    width = head_width // len(parts)
    frequency = 10000 ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    row_N, column_N = grid_coordinates(grid, scale, device, cells)
    coordinate = {"time": torch.zeros_like(row_N), "row": row_N, "column": column_N}
    angles = [coordinate[part][:, None] * frequency for part in parts]
    if layout == "release":
        angles = [angle.to(dtype) for angle in angles]
    cos_Nd = torch.cat([a.cos() for angle in angles for a in (angle, angle)], dim=-1)
    sin_Nd = torch.cat([a for angle in angles for a in (-angle.sin(), angle.sin())], dim=-1)
    return Rotary(cos_Nd.to(dtype), sin_Nd.to(dtype), len(parts))
