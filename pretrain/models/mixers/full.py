"""Full self-attention on all tokens in every block: the plain DiT (arXiv 2212.09748).

Letters: B images, N image tokens, D width, h heads, d a head's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.models.compute_budget import ComputeBudget
from pretrain.models.embeddings import Rotary
from pretrain.models.grids import Grid
from pretrain.models.mixers.base import Attention, Density, Modulation, Positions, TokenMixer, TokenState


class SelfAttention(nn.Module):
    """Full attention among [B, N, D] tokens, with rotary positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def initialise(self) -> None:
        """Outputs 0: a fresh block changes nothing."""
        nn.init.zeros_(self.out.weight)

    def forward(self, x_BND: Tensor, rotary: Rotary) -> Tensor:
        # Three parts of the last axis: their gradients are joined by one copy.
        q, k, v = (rearrange(part, "B N (h d) -> B h N d", h=self.heads) for part in self.qkv(x_BND).chunk(3, dim=-1))
        y_BhNd = F.scaled_dot_product_attention(rotary.turn(q), rotary.turn(k), v)
        return self.out(rearrange(y_BhNd, "B h N d -> B N (h d)"))


class FullMixer(TokenMixer):
    """Every token attends to every token."""

    # The tokens, their norm, what is projected, q, k and v as projected (v is a view of them), q and k as turned,
    # attention's output, and its projection.
    KEPT = 10

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.width = width
        self.attention = SelfAttention(width, heads)

    def mix(self, state: TokenState, modulation: Modulation, positions: Positions) -> tuple[TokenState, Tensor]:
        return state, self.attention(modulation.apply(state.x_BND), positions.tokens)

    def macs(self, tokens: Grid, budget: ComputeBudget) -> int:
        D, N = self.width, math.prod(self.grid(tokens, budget))
        return N * 4 * D * D + 2 * N * N * D

    def kept_vectors(self, tokens: Grid, budget: ComputeBudget) -> int:
        return self.KEPT * math.prod(self.grid(tokens, budget))


class FullAttention(Attention):
    """Full attention in the blocks that hold all tokens."""

    name = "full"

    def mixer(self) -> TokenMixer:
        return FullMixer(self.width, self.heads)


class Dense(Density):
    """Every block computes on all tokens."""

    name = "dense"

    def mixers(self, dense: Callable[[], TokenMixer]) -> list[TokenMixer]:
        return [dense() for _ in range(self.depth)]
