"""Attention mediators: attention whose cost is linear in the tokens (arXiv 2408.05710).

Letters: B images, N tokens of a grid of (rows, columns), n mediators, D width, m heads, d a head's width.

    T    = the queries, averaged over the cells of a square grid                 [n]
    Vmed = softmax(T Kᵀ/√d + P) V                                               over the N tokens
    out  = softmax(Q Tᵀ/√d + R) Vmed + depthwise 3×3 convolution of V           over the n mediators

P and R are learned biases of each layer and each n. Their tables do not depend on the picture's size: a 7×7 map that is
upsampled bilinearly, plus a term of the row and one of the column, upsampled linearly.

The authors train a network for each n. Here one network has tables for several, and training draws one n for each step.
Rotary positions: the queries are averaged before they are turned, and a mediator has its cell's centre as its position.

Initialisation: bias tables truncated normal(0.02), outputs 0, the convolution uniform(±1/3) as torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.models.compute_budget import ComputeBudget
from pretrain.models.embeddings import Rotary
from pretrain.models.grids import Grid, pool, pooling_macs, square
from pretrain.models.mixers.base import (
    Attention,
    Modulation,
    Positions,
    TokenMixer,
    TokenState,
    TrainingChoice,
    hash64,
)

MAP, LINE = 7, 16  # sides of the tables


@dataclass(frozen=True)
class MediatorsSection:
    """Settings of `attention: mediators`."""

    numbers: tuple[int, ...] = (4, 16, 64)
    """Numbers of mediators, each the square of a whole number, the fewest first; each training step draws one."""


class PairBias(nn.Module):
    """A bias [m, n, N] between mediators and the tokens of any grid."""

    def __init__(self, heads: int, mediators: int):
        super().__init__()
        self.map = nn.Parameter(torch.empty(heads, mediators, MAP, MAP))
        self.row = nn.Parameter(torch.empty(heads, mediators, LINE))
        self.column = nn.Parameter(torch.empty(heads, mediators, LINE))

    def initialise(self) -> None:
        """Draws the tables from a truncated normal(0.02)."""
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=0.02)

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

    def initialise(self) -> None:
        """Outputs 0: a fresh block changes nothing."""
        nn.init.zeros_(self.out.weight)

    def forward(self, x_BND: Tensor, grid: Grid, rotary: Rotary, rotary_mediators: Rotary, mediators: int) -> Tensor:
        """[B, N, D] to the same; `rotary_mediators` are the positions of the `mediators` mediators."""
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


class MediatorMixer(TokenMixer):
    """Attention of all tokens to the mediators, and of these to all tokens."""

    def __init__(self, width: int, heads: int, numbers: tuple[int, ...]):
        super().__init__()
        self.width = width
        self.attention = MediatorAttention(width, heads, numbers)

    def mix(self, state: TokenState, modulation: Modulation, positions: Positions) -> tuple[TokenState, Tensor]:
        cells = positions.coarse[Mediators.name]
        x_BND = modulation.apply(state.x_BND)
        return state, self.attention(x_BND, state.grid, positions.tokens, cells.rotary, math.prod(cells.grid))

    def macs(self, tokens: Grid, budget: ComputeBudget) -> int:
        D, N, n = self.width, math.prod(tokens), number_of(budget)
        return N * 4 * D * D + 4 * N * n * D + 9 * N * D + pooling_macs(tokens, square(n)) * D

    def kept_vectors(self, tokens: Grid, budget: ComputeBudget) -> int:
        return 11 * math.prod(tokens) + 3 * number_of(budget)


class Mediators(Attention):
    """Mediators in the blocks that hold all tokens. Its choice is their number n."""

    name = section_name = "mediators"
    section: MediatorsSection
    optional_parameters = (".gather_bias.", ".spread_bias.", ".self_attention.local.")

    @property
    def choices(self) -> tuple[int, ...]:
        return self.section.numbers

    def mixer(self) -> TokenMixer:
        return MediatorMixer(self.width, self.heads, self.choices)

    def problems(self) -> list[str]:
        found = []
        for n in self.choices:
            try:
                square(n)
            except ValueError as error:
                found.append(f"mediators.numbers: {error}")
        if not self.choices or list(self.choices) != sorted(set(self.choices)):
            found.append(f"mediators.numbers: {list(self.choices)} must be different numbers, the fewest first")
        return found

    def grid_problems(self, tokens: Grid) -> list[str]:
        most = square(self.choices[-1])[0]
        if most <= min(tokens):
            return []
        too_many = f"{self.choices[-1]} ({most} × {most}) do not fit {tokens[0]} × {tokens[1]} tokens"
        return [f"mediators.numbers: {too_many}; leave out the largest, or use larger pictures"]

    def default_choice(self, t: float) -> int:
        """Few mediators near noise, many near data, in equal parts of t."""
        last = len(self.choices) - 1
        return self.choices[min(max(int((1 - t) * len(self.choices)), 0), last)]

    def training_choice(self, cdf: Callable[[float], float], seed: int, step: int) -> TrainingChoice:
        """Each number as likely as the others."""
        return TrainingChoice(self.choices[hash64(f"mediators/{seed}/{step}") % len(self.choices)])

    def coarse_grid(self, tokens: Grid, choice: int) -> Grid:
        return square(choice)


def number_of(budget: ComputeBudget) -> int:
    """The number of mediators in a budget."""
    number = budget.get(Mediators.name)
    assert number is not None
    return number
