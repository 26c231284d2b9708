"""What a backbone costs: parameters by part, FLOPs and activations per image, computed from its shape alone.

Letters: N image tokens, n sparse ones or mediators, L text tokens, D width, E the text encoder's width, K blocks.

A multiply-add counts as two FLOPs; only matrix products and convolutions count (linear maps, attention, pooling), as is usual.
A training step is counted as three forward passes. Where the cost depends on the noise level, it is the mean over all levels,
unless an effort is given. `tests/unit/models/test_cost.py` compares them with modules built on the meta device, and the
activations with what torch keeps.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pretrain.models.budget import Effort
from pretrain.models.config import DiTConfig
from pretrain.models.focusdit.ffn import local_size
from pretrain.models.focusdit.mask import TIMESTEPS
from pretrain.models.grids import Grid, square
from pretrain.models.mixers.flexdit import BINS, DENSE, GENERATE, POOLING, RECOVER, SPARSE, roles, sparse_grid
from pretrain.models.mixers.mediators import LINE, MAP

CAPTION = 120  # tokens of a caption, where nobody says otherwise

# Vectors of width D that a block's self-attention keeps for its backward pass, of each token of the dense and the sparse grid.
# Full attention: the tokens, their norm, what is projected, q, k and v as projected (v is a view of them), q and k as turned,
# attention's output, and its projection.
_KEPT = {DENSE: (10, 0), POOLING: (2, 0), GENERATE: (6, 6), SPARSE: (0, 10), RECOVER: (7, 6)}


@dataclass(frozen=True)
class Parts:
    """Something counted, by part of the backbone."""

    attention: int
    ffn: int
    query_mask: int
    rest: int

    @property
    def total(self) -> int:
        return self.attention + self.ffn + self.query_mask + self.rest


class Parameters(Parts):
    """Parameters by part."""


class Flops(Parts):
    """FLOPs of one image's forward pass, by part."""


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _vocabulary_sizes(c: DiTConfig) -> list[int]:
    """Entries of each block's own expert; 0 where its FFN was pruned away."""
    sizes = [local_size(c.ffn, c.width, c.shared_width, block, c.depth) for block in range(c.depth)]
    return [0 if block in c.removed_ffns else size for block, size in enumerate(sizes)]


def _mask_layers(c: DiTConfig) -> list[tuple[int, int]]:
    sizes = (c.width, *c.mask_hidden, 1)
    return list(pairwise(sizes))


def count_parameters(c: DiTConfig) -> Parameters:
    """The parameters that `DiT(c)` has."""
    D, K, E, m = c.width, c.depth, c.text_width, c.heads
    attention = K * (_linear(D, D) + _linear(D, 2 * D) + _linear(D, D)) if E else 0
    for role in roles(c.density, K, c.split):
        attention += (2 if role == POOLING else 4) * _linear(D, D)
        if role == RECOVER:
            attention += 2 * _linear(D, D)
        if role == DENSE and c.attention == "mediators":
            attention += 10 * D + sum(2 * m * n * (MAP * MAP + 2 * LINE) for n in c.mediators)
    ffn = sum(_linear(D, size) + _linear(size, D) for size in _vocabulary_sizes(c) if size)
    if c.ffn == "shared":
        ffn += _linear(D, c.shared_width * D) + _linear(c.shared_width * D, D, bias=False)
    query_mask = 0
    if c.mask != "none":
        time = (TIMESTEPS + 1) * D + _linear(D, 2 * D) if c.mask == "release" else 2 * D
        query_mask = K * (time + sum(_linear(i + 1, o) for i, o in _mask_layers(c)))
    rest = (
        _linear(c.latent_channels * c.patch**2, D)
        + _linear(256, D)
        + _linear(D, D)
        + _linear(D, 6 * D)
        + (_linear(E, D) + _linear(D, D) if E else 0)
        + K * 6 * D
        + 2 * D
        + _linear(D, c.latent_channels * c.patch**2)
    )
    return Parameters(attention, ffn, query_mask, rest)


def grid_of(c: DiTConfig, resolution: int) -> Grid:
    """Rows and columns of tokens at a square resolution in pixels, for a VAE that shrinks by 8."""
    side, rest = divmod(resolution, 8 * c.patch)
    if rest:
        raise ValueError(f"{resolution} px is not divisible by 8 (the VAE) × {c.patch} (the patch)")
    return side, side


def count_flops(c: DiTConfig, grid: Grid, text_tokens: float, effort: Effort | None = None) -> Flops:
    """Forward FLOPs of one image of (rows, columns) of tokens with a caption of `text_tokens` (a mean may be a fraction)."""
    if effort is None:
        efforts = _efforts(c)
        each = [count_flops(c, grid, text_tokens, e) for e in efforts]
        return Flops(*(round(sum(parts) / len(each)) for parts in zip(*map(astuple, each), strict=True)))
    D, L = c.width, text_tokens
    N = math.prod(grid)
    attention: float = sum(_attention(c, role, grid, effort) for role in roles(c.density, c.depth, c.split))
    tokens = block_tokens(c, grid, effort)
    if c.text_width:
        attention += sum(n * 2 * D * D + L * 2 * D * D + 2 * n * L * D for n in tokens)
    query_mask = 0
    if c.mask != "none":
        time = 2 * D * D if c.mask == "release" else 0
        query_mask = sum(n * sum(i * o for i, o in _mask_layers(c)) + time for n in tokens)
    ffn = sum(n * flops for n, flops in zip(tokens, ffn_flops(c), strict=True))
    rest: float = 2 * N * c.latent_channels * c.patch**2 * D + 256 * D + D * D + 6 * D * D
    if c.text_width:
        rest += L * (c.text_width * D + D * D)
    return Flops(round(2 * attention), ffn, round(2 * query_mask), round(2 * rest))


def reading_flops(c: DiTConfig, text_tokens: float) -> int:
    """FLOPs of what `DiT.read` makes of a caption: all blocks' keys and values of it. `count_flops` holds them, too."""
    D, E = c.width, c.text_width
    return round(2 * text_tokens * (E * D + D * D + c.depth * 2 * D * D)) if E else 0


def _efforts(c: DiTConfig) -> list[Effort]:
    """The default effort at equally spaced noise levels that meet every part of both choices."""
    levels = 1
    if c.attention == "mediators":
        levels = math.lcm(levels, len(c.mediators))
    if c.density == "flexdit":
        levels = math.lcm(levels, BINS)
    return [Effort.at(c, (i + 0.5) / levels) for i in range(levels)]


def block_tokens(c: DiTConfig, grid: Grid, effort: Effort) -> list[int]:
    """The tokens that go through each block's FFN."""
    N = math.prod(grid)
    n = N if effort.bin is None else math.prod(sparse_grid(grid, c.sparsity, effort.bin))
    return [n if role in (GENERATE, SPARSE) else N for role in roles(c.density, c.depth, c.split)]


def _attention(c: DiTConfig, role: str, grid: Grid, effort: Effort) -> int:
    """Multiply-adds of a block's attention among image tokens."""
    D, N = c.width, math.prod(grid)
    if role == POOLING:
        return 2 * D * D
    if role == DENSE:
        if effort.mediators is None:
            return N * 4 * D * D + 2 * N * N * D
        pooling = _pooling(grid, square(effort.mediators)) * D
        return N * 4 * D * D + 4 * N * effort.mediators * D + 9 * N * D + pooling
    assert effort.bin is not None
    cells = sparse_grid(grid, c.sparsity, effort.bin)
    n = math.prod(cells)
    if role == SPARSE:
        return n * 4 * D * D + 2 * n * n * D
    if role == GENERATE:
        pooled = D + 1  # the tokens, and the query mask of the block before
        return (n * 2 + N * 2) * D * D + 2 * n * N * D + _pooling(grid, cells) * pooled
    return (N * 2 + n * 2) * D * D + 2 * n * N * D + 2 * N * D * D


def _pooling(grid: Grid, cells: Grid) -> int:
    """Multiply-adds of averaging one channel over cells (scales.py)."""
    if grid == cells:
        return 0
    return cells[0] * math.prod(grid) + cells[1] * cells[0] * grid[1]


def ffn_flops(c: DiTConfig) -> list[int]:
    """FLOPs of each block's FFN for one token, the shared expert's part included."""
    shared = c.shared_width * c.width if c.ffn == "shared" else 0
    return [4 * c.width * (size + shared) if size else 0 for size in _vocabulary_sizes(c)]


def saved_flops(c: DiTConfig, kept_SK: Tensor, tokens_SK: Tensor) -> Tensor:
    """FLOPs that skipping left out of each block's FFN at each step [S, K]: `kept_SK` of `tokens_SK` tokens went through it."""
    return (tokens_SK - kept_SK).double() * torch.tensor(ffn_flops(c), dtype=torch.float64)


def training_flops(c: DiTConfig, images: int, grid: Grid, text_tokens: int, effort: Effort | None = None) -> float:
    """FLOPs of a training step over `images` images with `text_tokens` tokens of text in all."""
    return 3.0 * images * count_flops(c, grid, text_tokens / images, effort).total


def count_activations(
    c: DiTConfig, grid: Grid, text_tokens: float, effort: Effort | None = None, recompute: bool = False
) -> float:
    """Bytes that a training step keeps of one image in bf16 for its backward pass, attention computed without its N×N matrix.

    Left out is what does not grow with the images (the mediators' biases), or hardly (the modulations).

    Args:
        effort: by default the one that needs the most.
        recompute: only the blocks' inputs are kept, and all of one block at a time.
    """
    if effort is None:
        return max(count_activations(c, grid, text_tokens, e, recompute) for e in _efforts(c))
    D, N, L = c.width, math.prod(grid), text_tokens
    tokens = block_tokens(c, grid, effort)
    shared = c.shared_width * D if c.ffn == "shared" else 0
    blocks: list[float] = []
    for role, n, size in zip(roles(c.density, c.depth, c.split), tokens, _vocabulary_sizes(c), strict=True):
        kept: float = _kept_by_attention(role, N, tokens, effort) * D
        if c.text_width:
            kept += 3 * n * D + 2 * L * D
        if c.mask != "none":
            kept += n * (2 * D + sum(c.mask_hidden))
        if size:  # the tokens, their norm, what is projected, the update, and its gate where each token has its own
            kept += n * ((5 if c.mask != "none" else 4) * D + 2 * (size + shared))
        blocks.append(kept)
    ends = N * (3 * D + c.latent_channels * c.patch**2) + (L * (c.text_width + 3 * D) if c.text_width else 0)
    inputs = N + sum(tokens[:-1])
    return 2 * (ends + (inputs * D + max(blocks) if recompute else sum(blocks)))


def _kept_by_attention(role: str, N: int, tokens: list[int], effort: Effort) -> int:
    """Vectors of width D that a block's self-attention keeps."""
    if role == DENSE and effort.mediators is not None:
        return 11 * N + 3 * effort.mediators
    dense, sparse = _KEPT[role]
    return dense * N + sparse * min(tokens)
