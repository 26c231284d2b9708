"""Tokens on a coarser grid: pooling down to cells, spreading back, and the cells' centres.

Letters: B images, N tokens of a grid of (rows, columns), n tokens of its cells, X any width.

Cell i of n along a side of R tokens covers tokens ⌊i·R/n⌋ up to ⌈(i + 1)·R/n⌉, as torch's adaptive average pooling has it;
written as two products, which keep the tokens' layout [B, N, X] and are deterministic on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Grid = tuple[int, int]


def averages(tokens: int, cells: int, device: torch.device | None = None) -> Tensor:
    """The weight of each token in each cell's mean along a side: [cells, tokens] in fp32."""
    i = torch.arange(cells, device=device)[:, None]
    token = torch.arange(tokens, device=device)
    inside = (token >= i * tokens // cells) & (token < -(-(i + 1) * tokens // cells))
    return inside / inside.sum(1, keepdim=True)


def pool(x_BNX: Tensor, grid: Grid, cells: Grid) -> Tensor:
    """Each cell's mean over its tokens: [B, N, X] on `grid` to [B, n, X] on `cells`."""
    if cells == grid:
        return x_BNX
    rows, columns = (averages(g, c, x_BNX.device).to(x_BNX.dtype) for g, c in zip(grid, cells, strict=True))
    x_BRCX = x_BNX.unflatten(1, grid)
    return (columns @ (rows @ x_BRCX.flatten(2)).unflatten(-1, x_BRCX.shape[2:])).flatten(1, 2)


def spread(x_BnX: Tensor, cells: Grid, grid: Grid) -> Tensor:
    """Each token takes its nearest cell's value: [B, n, X] on `cells` to [B, N, X] on `grid`."""
    if cells == grid:
        return x_BnX
    row, column = (torch.arange(g, device=x_BnX.device) * c // g for g, c in zip(grid, cells, strict=True))
    return x_BnX[:, (row[:, None] * cells[1] + column).flatten()]


def centres(tokens: int, cells: int, device: torch.device) -> Tensor:
    """The cells' places along a side, in tokens: [cells] in fp32, the mean place of each cell's tokens."""
    return averages(tokens, cells, device) @ torch.arange(tokens, device=device, dtype=torch.float32)


def square(cells: int) -> Grid:
    """The square grid with this number of cells. Raises ValueError where there is none."""
    side = math.isqrt(max(cells, 0))
    if side < 1 or side * side != cells:
        raise ValueError(f"{cells} is not the square of a whole number")
    return side, side


def pooling_macs(grid: Grid, cells: Grid) -> int:
    """Multiply-adds of averaging one channel of a grid over its cells."""
    return 0 if grid == cells else cells[0] * math.prod(grid) + cells[1] * cells[0] * grid[1]
