"""FlexDiT: fewer tokens in the middle of the network (arXiv 2412.06028; published as SparseDiT).

Letters: B images, N tokens, n tokens of the coarser grid, D width, h heads, d a head's width.

Blocks by role, from bottom to top:

    pooling                                 attention is the mean over all tokens
    generate, sparse × s, recover, dense    a Sparse-Dense Token Module, several of them
    dense                                   ordinary blocks

`generate` pools the tokens to a coarser grid, `sparse` blocks compute there, `recover` brings what they found back to all
tokens, y = W1 · spread(sparse) + W2 · x with W1 = 0 and W2 = I at the start. Where the grid changes, the query mask of the
block before comes along: averaged over the cells on the way down, each token its cell's on the way up.

How coarse the grid is follows from the noise level t (0 is data, 1 noise): of R × C tokens round(R·√(1 − r)) × round(C·√(1 − r))
are left, where the removed share r rises from r_min at data to r_max at noise, in four bins of t: r_min below 1/4, then linear
at the bins' upper ends. All images of a training step lie in one bin. Step s takes the bin of the quantile (o + s·φ) mod 1 of the
objective's times (φ the golden ratio's fraction, o from the seed): bins come as often as the times lie in them, more evenly
spaced than by chance, and within a bin the times are drawn as the objective has them. So the mean over steps is the unbinned
expectation, and no loss needs a weight.

With a `grid` of the section the coarser grid is that one at every noise level, as in the authors' public logs (8 × 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.models.compute_budget import ComputeBudget
from pretrain.models.embeddings import Rotary
from pretrain.models.grids import Grid, pool, pooling_macs, spread
from pretrain.models.mixers.base import (
    Density,
    DerivedParameter,
    Modulation,
    Positions,
    TokenMixer,
    TokenState,
    TrainingChoice,
    hash64,
)
from pretrain.models.mixers.full import FullMixer, SelfAttention

BINS = 4
GOLDEN = (math.sqrt(5) - 1) / 2

POOLING, GENERATE, SPARSE, RECOVER, DENSE = "pooling", "generate", "sparse", "recover", "dense"

# Pooling blocks, modules, sparse blocks in each, dense blocks on top.
Split = tuple[int, int, int, int]

# By depth. 28 blocks are DiT-XL's at 512 px; the paper's 256 px model has (1, 4, 3, 3). 12 blocks, DiT-B's: a reading.
SPLITS: dict[int, Split] = {8: (1, 1, 3, 1), 12: (1, 2, 2, 1), 28: (2, 4, 3, 2)}


@dataclass(frozen=True)
class FlexDiTSection:
    """Settings of `density: flexdit`."""

    split: Split | None = None
    """Pooling blocks, modules, sparse blocks in each, dense blocks on top; by default the depth's own (SPLITS)."""
    sparsity: tuple[float, float] = (0.61, 0.86)
    """Share of tokens removed at data, and at noise."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the coarser grid at every noise level, in place of `sparsity`; the authors trained 8 × 8."""


# ---- the split into roles, and the coarser grid ----


def blocks_of(split: Split) -> int:
    """The depth that a split makes up."""
    pooling, modules, sparse, top = split
    return pooling + modules * (sparse + 3) + top


def split_of(depth: int, split: Split | None) -> Split:
    """The given split, or the table's for this depth. Raises ValueError where there is none, or it makes up another depth."""
    found = SPLITS.get(depth) if split is None else split
    what = "it is [pooling blocks, modules, sparse blocks in each, dense blocks on top]"
    sum_ = "pooling + modules × (sparse + 3) + top"
    if found is None:
        known = ", ".join(map(str, SPLITS))
        raise ValueError(
            f"no split is known for {depth} blocks (only for {known}); give one whose {sum_} is {depth}: {what}"
        )
    if len(found) != 4 or min(found) < 0 or found[1] < 1 or found[2] < 1:
        raise ValueError(
            f"{list(found)}: expected four numbers, one module with one sparse block at least, and nothing below 0: {what}"
        )
    if blocks_of(found) != depth:
        raise ValueError(f"{list(found)} makes {blocks_of(found)} blocks ({sum_}), but depth is {depth}: {what}")
    return found


def roles(depth: int, split: Split | None) -> tuple[str, ...]:
    """Each block's role. Raises ValueError as `split_of`."""
    pooling, modules, sparse, top = split_of(depth, split)
    module = (GENERATE, *(SPARSE,) * sparse, RECOVER, DENSE)
    return (POOLING,) * pooling + module * modules + (DENSE,) * top


def bin_of(t: float) -> int:
    """The bin of a noise level in 0..1."""
    return min(max(int(t * BINS), 0), BINS - 1)


def removed(sparsity: tuple[float, float], bin_: int) -> float:
    """The removed share r of a bin."""
    low, high = sparsity
    return low + (high - low) * bin_ / (BINS - 1)


def sparse_grid(grid: Grid, sparsity: tuple[float, float], bin_: int) -> Grid:
    """The coarser grid in a bin. Raises ValueError where nothing would be left of a side."""
    r = removed(sparsity, bin_)
    rows, columns = (round(side * math.sqrt(1 - r)) for side in grid)
    if min(rows, columns) < 1:
        raise ValueError(
            f"flexdit.sparsity: {r:.2f} of {grid[0]} × {grid[1]} tokens removed leaves {rows} × {columns}; "
            "lower it, or use larger pictures"
        )
    return rows, columns


# ---- the blocks' attentions ----


class MeanAttention(nn.Module):
    """Attention with equal weights: every token receives the mean of all values, [B, 1, D].

    The mean of the values is the value of the mean, so one token is projected instead of N.
    """

    def __init__(self, width: int):
        super().__init__()
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def initialise(self) -> None:
        """Outputs 0: a fresh block changes nothing."""
        nn.init.zeros_(self.out.weight)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.out(self.value(x_BND.mean(1, keepdim=True)))


class CrossScaleAttention(SelfAttention):
    """Attention from [B, N, D] tokens of one grid to [B, n, D] of another, with self-attention's parameters."""

    def forward(self, x_BND: Tensor, rotary: Rotary, from_BnD: Tensor, rotary_from: Rotary) -> Tensor:  # type: ignore[override]
        """The update [B, N, D] of `x_BND`; queries and keys are turned by their own grid's positions."""
        D = x_BND.shape[-1]
        q_weight, kv_weight = self.qkv.weight.split([D, 2 * D])
        q_bias, kv_bias = self.qkv.bias.split([D, 2 * D])
        q = rearrange(F.linear(x_BND, q_weight, q_bias), "B N (h d) -> B h N d", h=self.heads)
        kv_BnX = F.linear(from_BnD, kv_weight, kv_bias)
        k, v = rearrange(kv_BnX, "B n (two h d) -> two B h n d", two=2, h=self.heads)
        y_BhNd = F.scaled_dot_product_attention(rotary.turn(q), rotary_from.turn(k), v)
        return self.out(rearrange(y_BhNd, "B h N d -> B N (h d)"))


# ---- the blocks' mixers ----


class PoolingMixer(TokenMixer):
    """Gives every token the mean of all."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.attention = MeanAttention(width)

    def mix(self, state: TokenState, modulation: Modulation, positions: Positions) -> tuple[TokenState, Tensor]:
        return state, self.attention(modulation.apply(state.x_BND))

    def macs(self, tokens: Grid, budget: ComputeBudget) -> int:
        return 2 * self.width**2

    def kept_vectors(self, tokens: Grid, budget: ComputeBudget) -> int:
        return 2 * math.prod(tokens)


class SparseMixer(FullMixer):
    """Full attention on the coarser grid."""

    def __init__(self, method: FlexDiT):
        super().__init__(method.width, method.heads)
        self.method = method

    def grid(self, tokens: Grid, budget: ComputeBudget) -> Grid:
        return self.method.cells(tokens, budget)

    def mix(self, state: TokenState, modulation: Modulation, positions: Positions) -> tuple[TokenState, Tensor]:
        return state, self.attention(modulation.apply(state.x_BND), positions.coarse[FlexDiT.name].rotary)


class GenerateMixer(TokenMixer):
    """Pools the tokens to the coarser grid, whose tokens attend to all."""

    def __init__(self, method: FlexDiT):
        super().__init__()
        self.method = method
        self.attention = CrossScaleAttention(method.width, method.heads)

    def mix(self, state: TokenState, modulation: Modulation, positions: Positions) -> tuple[TokenState, Tensor]:
        cells = positions.coarse[FlexDiT.name]
        x_BnD, mask_Bn1 = (pool(x, state.grid, cells.grid) for x in (state.x_BND, state.mask_BN1))
        sparse = TokenState(x_BnD, cells.grid, mask_Bn1, dense=state)
        return sparse, self.attention(
            modulation.apply(x_BnD), cells.rotary, modulation.apply(state.x_BND), positions.tokens
        )

    def grid(self, tokens: Grid, budget: ComputeBudget) -> Grid:
        return self.method.cells(tokens, budget)

    def macs(self, tokens: Grid, budget: ComputeBudget) -> int:
        D, cells = self.method.width, self.method.cells(tokens, budget)
        N, n = math.prod(tokens), math.prod(cells)
        pooled = D + 1  # the tokens, and the query mask of the block before
        return (n * 2 + N * 2) * D * D + 2 * n * N * D + pooling_macs(tokens, cells) * pooled

    def kept_vectors(self, tokens: Grid, budget: ComputeBudget) -> int:
        return 6 * math.prod(tokens) + 6 * math.prod(self.method.cells(tokens, budget))


class RecoverMixer(TokenMixer):
    """Adds the sparse tokens to all tokens, y = W1 · spread(sparse) + W2 · x, which then attend to them.

    The keys and values are normalised and modulated as the queries are.
    """

    def __init__(self, method: FlexDiT):
        super().__init__()
        D = method.width
        self.method = method
        self.attention = CrossScaleAttention(D, method.heads)
        self.from_sparse, self.from_dense = nn.Linear(D, D), nn.Linear(D, D)
        self.extra = {"from_sparse": self.from_sparse, "from_dense": self.from_dense}

    def initialise(self) -> None:
        """W1 = 0, W2 = I: all tokens are recovered as they were."""
        nn.init.zeros_(self.from_sparse.weight)
        nn.init.eye_(self.from_dense.weight)

    def mix(self, state: TokenState, modulation: Modulation, positions: Positions) -> tuple[TokenState, Tensor]:
        dense = state.dense
        assert dense is not None
        y_BND = self.from_sparse(spread(state.x_BND, state.grid, dense.grid)) + self.from_dense(dense.x_BND)
        back = TokenState(y_BND, dense.grid, spread(state.mask_BN1, state.grid, dense.grid))
        rotary = positions.coarse[FlexDiT.name].rotary
        return back, self.attention(modulation.apply(y_BND), positions.tokens, modulation.apply(state.x_BND), rotary)

    def macs(self, tokens: Grid, budget: ComputeBudget) -> int:
        D, N = self.method.width, math.prod(tokens)
        n = math.prod(self.method.cells(tokens, budget))
        return (N * 2 + n * 2) * D * D + 2 * n * N * D + 2 * N * D * D

    def kept_vectors(self, tokens: Grid, budget: ComputeBudget) -> int:
        return 7 * math.prod(tokens) + 6 * math.prod(self.method.cells(tokens, budget))


# ---- the method ----


class FlexDiT(Density):
    """Fewer tokens in the middle blocks. Its choice is the bin of the noise level."""

    name = section_name = "flexdit"
    section: FlexDiTSection
    optional_parameters = (".from_sparse.", ".from_dense.")
    derived_parameters: ClassVar[Mapping[str, DerivedParameter]] = {
        ".self_attention.value.": DerivedParameter(".self_attention.qkv.", 2, 3, "the last third of qkv's")
    }

    @property
    def choices(self) -> tuple[int, ...]:
        return tuple(range(BINS if self.section.grid is None else 1))

    def mixers(self, dense: Callable[[], TokenMixer]) -> list[TokenMixer]:
        make: dict[str, Callable[[], TokenMixer]] = {
            DENSE: dense,
            POOLING: lambda: PoolingMixer(self.width),
            GENERATE: lambda: GenerateMixer(self),
            SPARSE: lambda: SparseMixer(self),
            RECOVER: lambda: RecoverMixer(self),
        }
        return [make[role]() for role in roles(self.depth, self.section.split)]

    def problems(self) -> list[str]:
        """Lists why FlexDiT cannot have these settings at this depth, each with the mend."""
        found, section = [], self.section
        try:
            split_of(self.depth, section.split)
        except ValueError as error:
            found.append(f"flexdit.split: {error}")
        if len(section.sparsity) != 2 or not 0 < section.sparsity[0] <= section.sparsity[1] < 1:
            found.append(
                f"flexdit.sparsity: {list(section.sparsity)} must be two shares above 0 and below 1, the first not above the "
                "second"
            )
        fixed = section.grid
        if fixed is not None and (len(fixed) != 2 or min(fixed) < 1):
            found.append(f"flexdit.grid: {list(fixed)} must be rows and columns, each at least 1")
        if fixed is not None and section.sparsity != FlexDiTSection.sparsity:
            found.append("flexdit.grid and flexdit.sparsity: the one is in place of the other; give one")
        return found

    def grid_problems(self, tokens: Grid) -> list[str]:
        fixed = self.section.grid
        if fixed is not None:
            fits = all(cells <= side for cells, side in zip(fixed, tokens, strict=True))
            said = f"flexdit.grid: {fixed[0]} × {fixed[1]} is finer than the picture's {tokens[0]} × {tokens[1]} tokens"
            return [] if fits else [f"{said}; lower it, or use larger pictures"]
        try:
            self.coarse_grid(tokens, BINS - 1)
        except ValueError as error:
            return [str(error)]
        return []

    def default_choice(self, t: float) -> int:
        return bin_of(t) if self.section.grid is None else 0

    def training_choice(self, cdf: Callable[[float], float], seed: int, step: int) -> TrainingChoice:
        if self.section.grid is not None:
            return TrainingChoice(0)
        edges = [cdf(i / BINS) for i in range(BINS + 1)]
        quantile = (hash64(f"density/{seed}") / 2**64 + step * GOLDEN) % 1
        bin_ = max(i for i in range(BINS) if edges[i] <= quantile)
        return TrainingChoice(bin_, (edges[bin_], edges[bin_ + 1]))

    def coarse_grid(self, tokens: Grid, choice: int) -> Grid:
        return self.section.grid or sparse_grid(tokens, self.section.sparsity, choice)

    def cells(self, tokens: Grid, budget: ComputeBudget) -> Grid:
        """The coarser grid in a budget."""
        bin_ = budget.get(self.name)
        assert bin_ is not None
        return self.coarse_grid(tokens, bin_)
