"""The cost of a backbone: parameters by part, FLOPs and activations per image, computed from its shape alone.

Letters: N image tokens, L text tokens, D width, E the text encoder's width, K blocks, S sampling steps.

A multiply-add counts as two FLOPs; only matrix products and convolutions count (linear maps, attention, pooling), as is usual.
A training step is counted as three forward passes. Where the cost depends on the noise level, it is the mean over all levels,
unless a budget is given. Token mixers count their own multiply-adds (`mixers/`). `tests/unit/models/test_cost.py` compares all
with modules built on the meta device, and the activations with what torch keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pretrain.models import fusion
from pretrain.models.alignment import Alignment
from pretrain.models.budget_choices import every_budget
from pretrain.models.compute_budget import ComputeBudget
from pretrain.models.config import DiTConfig
from pretrain.models.dit import DiT
from pretrain.models.embeddings import TimeEmbed
from pretrain.models.focusdit import ffn, mask
from pretrain.models.grids import Grid
from pretrain.models.mixers.base import TokenMixer
from pretrain.models.routing import Routing

CAPTION = 120  # tokens of a caption, where none is given


@dataclass(frozen=True)
class Parts:
    """A count by part of the backbone."""

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


@lru_cache
def _on_meta(c: DiTConfig) -> DiT:
    """The backbone without memory."""
    with torch.device("meta"):
        return DiT(c)


def _mixers(c: DiTConfig) -> list[TokenMixer]:
    return [_on_meta(c).block(index).mixer for index in range(c.depth)]


def _vocabulary_sizes(c: DiTConfig) -> list[int]:
    """The entries that each block's tokens query, the shared expert's included; 0 where the block's FFN was pruned away."""
    shared = c.shared_width * c.width if c.ffn == "shared" else 0
    sizes = [ffn.local_size(c.ffn, c.width, c.shared_width, block, c.depth) for block in range(c.depth)]
    return [0 if block in c.removed_ffns else size + shared for block, size in enumerate(sizes)]


def count_parameters(c: DiTConfig) -> Parameters:
    """The parameters of `DiT(c)`, counted on the meta device."""

    def part(name: str) -> str:
        names = name.split(".")
        inside = names[2] if names[0] == "blocks" else names[0]
        return {"scale_shift_table": "rest", "shared_expert": "ffn", "ffn": "ffn", "query_mask": "query_mask"}.get(
            inside, "attention" if names[0] == "blocks" else "rest"
        )

    counts = dict.fromkeys(("attention", "ffn", "query_mask", "rest"), 0)
    for name, parameter in _on_meta(c).named_parameters():
        counts[part(name)] += parameter.numel()
    return Parameters(**counts)


def count_hidden_matrices(c: DiTConfig) -> int:
    """The parameters that are Muon's where a config asks for it (`DiT.hidden_matrices`)."""
    return sum(matrix.numel() for matrix in _on_meta(c).hidden_matrices)


def grid_of(c: DiTConfig, resolution: int, downsample: int) -> Grid:
    """Rows and columns of tokens at a square resolution in pixels, for a VAE of `downsample` pixels per latent pixel.

    Raises:
        ValueError: VAE and patch do not divide the resolution.
    """
    side, rest = divmod(resolution, downsample * c.patch)
    if rest:
        raise ValueError(f"{resolution} px is not divisible by {downsample} (the VAE) × {c.patch} (the patch)")
    return side, side


def count_flops(
    c: DiTConfig, grid: Grid, text_tokens: float, budget: ComputeBudget | None = None, routing: Routing | None = None
) -> Flops:
    """Forward FLOPs of one image of (rows, columns) of tokens with a caption of `text_tokens` (a mean may be a fraction).

    Args:
        routing: that of a routed training step; by default all tokens are computed.
    """
    if budget is None:
        budgets = every_budget(c)
        each = [count_flops(c, grid, text_tokens, b, routing) for b in budgets]
        return Flops(*(round(sum(parts) / len(each)) for parts in zip(*map(astuple, each), strict=True)))
    D, L = c.width, text_tokens
    N = math.prod(grid)
    given = [grid if routing is None else _kept(routing, block, grid) for block in range(c.depth)]
    attention: float = sum(mixer.macs(g, budget) for mixer, g in zip(_mixers(c), given, strict=True))
    tokens = [math.prod(mixer.grid(g, budget)) for mixer, g in zip(_mixers(c), given, strict=True)]
    if c.text_width:
        attention += sum(n * 2 * D * D + L * 2 * D * D + 2 * n * L * D for n in tokens)
    query_mask = sum(mask.macs(c.mask, c.width, c.mask_hidden, n) for n in tokens)
    ffns = sum(n * flops for n, flops in zip(tokens, ffn_flops(c), strict=True))
    rest: float = 2 * N * c.latent_channels * c.patch**2 * D + TimeEmbed.frequencies * D + D * D + 6 * D * D
    if c.text_width:
        rest += L * (c.text_width * D + D * D)
    if c.fusion:
        rest += fusion.macs(D, N, N if routing is None else routing.kept(N))
    return Flops(round(2 * attention), ffns, round(2 * query_mask), round(2 * rest))


def _kept(routing: Routing, block: int, grid: Grid) -> Grid:
    """The tokens that a block computes, as one row of them where they are a part of the grid."""
    N = math.prod(grid)
    n = routing.tokens(block, N)
    return grid if n == N else (1, n)


def text_flops(c: DiTConfig, text_tokens: float) -> int:
    """FLOPs of `DiT.encode_text`: all blocks' keys and values of a caption. `count_flops` holds them, too."""
    D, E = c.width, c.text_width
    return round(2 * text_tokens * (E * D + D * D + c.depth * 2 * D * D)) if E else 0


def block_tokens(c: DiTConfig, grid: Grid, budget: ComputeBudget) -> list[int]:
    """The tokens that go through each block's FFN."""
    return [math.prod(mixer.grid(grid, budget)) for mixer in _mixers(c)]


def ffn_flops(c: DiTConfig) -> list[int]:
    """FLOPs of each block's FFN for one token, the shared expert's part included."""
    return [4 * c.width * size for size in _vocabulary_sizes(c)]


def ffn_shares(c: DiTConfig, grid: Grid, text_tokens: float = CAPTION) -> list[float]:
    """Each block's FFN's share of a forward pass's FLOPs, the mean over all compute budgets."""
    tokens = [block_tokens(c, grid, budget) for budget in every_budget(c)]
    means = [sum(of_block) / len(tokens) for of_block in zip(*tokens, strict=True)]
    total = count_flops(c, grid, text_tokens).total
    return [n * flops / total for n, flops in zip(means, ffn_flops(c), strict=True)]


def saved_flops(c: DiTConfig, kept_SK: Tensor, tokens_SK: Tensor) -> Tensor:
    """FLOPs that skipping left out of each block's FFN at each step [S, K]: `kept_SK` of `tokens_SK` tokens went through it."""
    return (tokens_SK - kept_SK).double() * torch.tensor(ffn_flops(c), dtype=torch.float64)


def training_flops(
    c: DiTConfig,
    images: int,
    grid: Grid,
    text_tokens: float,
    budget: ComputeBudget | None = None,
    routing: Routing | None = None,
    alignment: Alignment | None = None,
    features: int = 0,
) -> float:
    """FLOPs of a training step over `images` images with `text_tokens` tokens of text in all.

    Args:
        routing, alignment: those of this step.
        features: the width of the features that the alignment is with.
    """
    forward = count_flops(c, grid, text_tokens / images, budget, routing).total
    if alignment is not None:
        forward += 2 * alignment.macs(c.width, features, alignment.tokens(math.prod(grid), routing))
    return 3.0 * images * forward


def training_phases(
    c: DiTConfig,
    grid: Grid,
    text_tokens: float,
    steps: int,
    routing: Routing | None,
    alignment: Alignment | None,
    features: int,
) -> list[tuple[int, float]]:
    """FLOPs of one image in each phase of a training of `steps` steps: the step with which the phase ends, and the FLOPs.

    Args:
        routing, alignment, features: the run's, as `training_flops` takes them for a step.
    """
    routed, aligned = (0 if method is None else method.steps(steps) for method in (routing, alignment))
    phases, start = [], 0
    for end in sorted({routed, aligned, steps} - {0}):
        methods = (routing if start < routed else None, alignment if start < aligned else None)
        phases.append((end, training_flops(c, 1, grid, text_tokens, None, *methods, features)))
        start = end
    return phases


def mean_flops(phases: Sequence[tuple[int, float]]) -> float:
    """The mean over the steps of phases, such as those of `training_phases`, of FLOPs or another figure of a step."""
    total, start = 0.0, 0
    for end, flops in phases:
        total, start = total + (end - start) * flops, end
    return total / start


def count_activations(
    c: DiTConfig, grid: Grid, text_tokens: float, budget: ComputeBudget | None = None, recompute: bool = False
) -> float:
    """Bytes that a training step keeps of one image in bf16 for its backward pass, attention computed without its N×N matrix.

    Left out is what does not grow with the images (the mixers' biases), or hardly (the modulations).

    Args:
        budget: by default the one that needs the most.
        recompute: only the blocks' inputs are kept, and all of one block at a time.
    """
    if budget is None:
        return max(count_activations(c, grid, text_tokens, b, recompute) for b in every_budget(c))
    D, N, L = c.width, math.prod(grid), text_tokens
    tokens = block_tokens(c, grid, budget)
    blocks: list[float] = []
    for mixer, n, size in zip(_mixers(c), tokens, _vocabulary_sizes(c), strict=True):
        kept: float = mixer.kept_vectors(grid, budget) * D
        if c.text_width:
            kept += 3 * n * D + 2 * L * D
        if c.mask != "none":
            kept += n * (2 * D + sum(c.mask_hidden))
        if size:  # the tokens, their norm, what is projected, the update, and its gate where each token has its own
            kept += n * ((5 if c.mask != "none" else 4) * D + 2 * size)
        blocks.append(kept)
    ends = N * (3 * D + c.latent_channels * c.patch**2) + (L * (c.text_width + 3 * D) if c.text_width else 0)
    if c.fusion:  # what the deep blocks added
        ends += N * D
    inputs = N + sum(tokens[:-1])
    return 2 * (ends + (inputs * D + max(blocks) if recompute else sum(blocks)))
