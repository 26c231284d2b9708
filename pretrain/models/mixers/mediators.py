"""Attention mediators: attention whose cost is linear in the tokens (arXiv 2408.05710).

Letters: B images, N tokens of a grid of (rows, columns), n mediators, D width, m heads, d a head's width.

    T    = the queries, averaged over the cells of a square grid                 [n]
    Vmed = softmax(T Kᵀ/√d + P) V                                               over the N tokens
    out  = softmax(Q Tᵀ/√d + R) Vmed + depthwise 3×3 convolution of V           over the n mediators

P and R are learned biases of each layer and each n. Their tables do not depend on the picture's size: a 7×7 map that is
upsampled bilinearly, plus a term of the row and one of the column, upsampled linearly.

The authors train a network for each n. Here one network has tables for several, and training draws one n for each step.
Rotary positions: the queries are averaged before they are turned, and a mediator has its cell's centre as its position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.models.embeddings import Rotary
from pretrain.models.grids import Grid, pool, square

MAP, LINE = 7, 16  # sides of the tables


class PairBias(nn.Module):
    """A bias [m, n, N] between mediators and the tokens of any grid."""

    def __init__(self, heads: int, mediators: int):
        super().__init__()
        self.map = nn.Parameter(torch.empty(heads, mediators, MAP, MAP))
        self.row = nn.Parameter(torch.empty(heads, mediators, LINE))
        self.column = nn.Parameter(torch.empty(heads, mediators, LINE))

    def forward(self, grid: Grid) -> Tensor:
        rows, columns = grid
        # The lines as images: of torch's interpolations, the bilinear one alone can be deterministic on GPUs.
        map_ = F.interpolate(self.map, size=grid, mode="bilinear")
        row = F.interpolate(self.row[..., None], size=(rows, 1), mode="bilinear")
        column = F.interpolate(self.column[..., None, :], size=(1, columns), mode="bilinear")
        return (map_ + row + column).flatten(2)


class MediatorAttention(nn.Module):
    """Self-attention through mediators; `qkv` and `out` are those of full attention."""

    def __init__(self, width: int, heads: int, choices: tuple[int, ...]):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.gather_bias = nn.ModuleDict({str(n): PairBias(heads, n) for n in choices})
        self.spread_bias = nn.ModuleDict({str(n): PairBias(heads, n) for n in choices})
        self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x_BND: Tensor, grid: Grid, rotary: Rotary, rotary_mediators: Rotary, mediators: int) -> Tensor:
        """[B, N, D] to the same; `rotary_mediators` are the positions of so many mediators."""
        gather, spread = self.gather_bias[str(mediators)], self.spread_bias[str(mediators)]
        q_BND, k_BND, v_BND = self.qkv(x_BND).chunk(3, dim=-1)
        t_Bmnd = self._heads(pool(q_BND, grid, square(mediators)))
        q, k, v = (self._heads(part) for part in (q_BND, k_BND, v_BND))
        t = rotary_mediators.turn(t_Bmnd)
        seen_Bmnd = F.scaled_dot_product_attention(t, rotary.turn(k), v, attn_mask=gather(grid)[None].to(q.dtype))
        bias_mNn = spread(grid).transpose(1, 2)[None].to(q.dtype)
        y_BmNd = F.scaled_dot_product_attention(rotary.turn(q), t, seen_Bmnd, attn_mask=bias_mNn)
        image_BDHW = v_BND.transpose(1, 2).unflatten(2, grid)
        local_BND = self.local(image_BDHW).flatten(2).transpose(1, 2)
        return self.out(rearrange(y_BmNd, "B m N d -> B N (m d)") + local_BND)

    def _heads(self, x_BND: Tensor) -> Tensor:
        return rearrange(x_BND, "B N (m d) -> B m N d", m=self.heads)
