"""What a backbone costs: parameters by part and FLOPs per image, computed from its shape alone.

Letters: N image tokens, L text tokens, D width, E the text encoder's width, K blocks.

A multiply-add counts as two FLOPs; only matrix products count (linear maps and attention), as is usual. A training step is
counted as three forward passes. `tests/unit/models/test_cost.py` compares both with modules built on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pretrain.models.config import DiTConfig
from pretrain.models.ffn import local_size
from pretrain.models.mask import TIMESTEPS


@dataclass(frozen=True)
class Parameters:
    """Parameters by part."""

    attention: int
    ffn: int
    query_mask: int
    rest: int

    @property
    def total(self) -> int:
        return self.attention + self.ffn + self.query_mask + self.rest


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image's forward pass, by part."""

    attention: int
    ffn: int
    query_mask: int
    rest: int

    @property
    def total(self) -> int:
        return self.attention + self.ffn + self.query_mask + self.rest


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
    D, K = c.width, c.depth
    attention = K * (_linear(D, 3 * D) + _linear(D, D) + _linear(D, D) + _linear(D, 2 * D) + _linear(D, D))
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
        + _linear(c.text_width, D)
        + _linear(D, D)
        + K * 6 * D
        + 2 * D
        + _linear(D, c.latent_channels * c.patch**2)
    )
    return Parameters(attention, ffn, query_mask, rest)


def tokens_of(c: DiTConfig, resolution: int) -> int:
    """Image tokens at a square resolution in pixels, for a VAE that shrinks by 8."""
    side, rest = divmod(resolution, 8 * c.patch)
    if rest:
        raise ValueError(f"{resolution} px is not divisible by 8 (the VAE) × {c.patch} (the patch)")
    return side * side


def count_flops(c: DiTConfig, image_tokens: int, text_tokens: float) -> Flops:
    """Forward FLOPs of one image of `image_tokens` with a caption of `text_tokens` (a mean may be a fraction)."""
    D, K, N, L = c.width, c.depth, image_tokens, text_tokens
    self_attention = N * 4 * D * D + 2 * N * N * D
    cross_attention = N * 2 * D * D + L * 2 * D * D + 2 * N * L * D
    query_mask = 0
    if c.mask != "none":
        query_mask = N * sum(i * o for i, o in _mask_layers(c)) + (2 * D * D if c.mask == "release" else 0)
    patch = c.latent_channels * c.patch**2 * D
    rest = 2 * N * patch + L * (c.text_width * D + D * D) + 256 * D + D * D + 6 * D * D
    attention, query_mask, rest = (round(2 * m) for m in (K * (self_attention + cross_attention), K * query_mask, rest))
    return Flops(attention, N * sum(ffn_flops(c)), query_mask, rest)


def ffn_flops(c: DiTConfig) -> list[int]:
    """FLOPs of each block's FFN for one token, the shared expert's part included."""
    shared = c.shared_width * c.width if c.ffn == "shared" else 0
    return [4 * c.width * (size + shared) if size else 0 for size in _vocabulary_sizes(c)]


def saved_flops(c: DiTConfig, kept_SK: Tensor, tokens_S: Tensor) -> Tensor:
    """FLOPs that skipping left out of each block's FFN at each step [S, K]: `kept_SK` of `tokens_S` tokens went through it."""
    return (tokens_S[:, None] - kept_SK).double() * torch.tensor(ffn_flops(c), dtype=torch.float64)


def training_flops(c: DiTConfig, images: int, image_tokens: int, text_tokens: int) -> float:
    """FLOPs of a training step over `images` images with `text_tokens` tokens of text in all."""
    return 3.0 * images * count_flops(c, image_tokens, text_tokens / images).total
