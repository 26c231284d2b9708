"""A transformer block, and what all blocks of one forward pass share.

Letters: B images, N tokens, D width, K blocks.

One block (FocusDiT, §4):

    x += gate_msa · SelfAttention(LN(x)·(1 + scale_msa) + shift_msa)
    x += CrossAttention(x, text)                       its input is not normalised
    m  = QueryMask(x, m, t)                            Eq. 2; `mask: none` leaves it out
    x += m · gate_mlp · FFN(LN(x)·(1 + scale_mlp) + shift_mlp)      Eq. 3: the mask weights the FFN's output

The six modulations are the block's own 6 × D table plus one projection of the time that all blocks share (AdaLN-single).

FlexDiT's other blocks differ from it in their attention alone (density.py names the roles). Where the scale changes, the query
mask of the block before comes along: averaged over the cells on the way down, each token its cell's on the way up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.budget import Effort
from pretrain.models.config import DiTConfig
from pretrain.models.embeddings import Rotary
from pretrain.models.focusdit import ffn, mask
from pretrain.models.focusdit.skip import Skip, on_kept
from pretrain.models.grids import Grid, pool, spread
from pretrain.models.mixers import flexdit as density
from pretrain.models.mixers.full import CrossAttention, CrossScaleAttention, MeanAttention, SelfAttention
from pretrain.models.mixers.mediators import MediatorAttention
from pretrain.models.text import PackedText, Runs


@dataclass(frozen=True)
class TimeMemory:
    """All that follows from the times alone, for B images or (B = 1) for all of them: made once for all sampling steps.

    Attributes:
        time_BD: the time embedding.
        modulation_B6D: the blocks' shared modulation.
        masks: each block's scale and shift [B, 1, D] of its query mask; None without query masks, and in training, where
            each block makes its own.
        effort: the default at a single time; None where the times are several.
    """

    time_BD: Tensor
    modulation_B6D: Tensor
    masks: tuple[tuple[Tensor, Tensor], ...] | None = None
    effort: Effort | None = None


@dataclass(frozen=True)
class Positions:
    """Rotary positions of the tokens, and of the coarser grids over them that the model uses.

    Attributes:
        tokens: of all tokens.
        cells: (rows, columns) of FlexDiT's sparse grid, and its positions.
        mediators: their number, and their positions.
    """

    tokens: Rotary
    cells: tuple[Grid, Rotary] | None = None
    mediators: tuple[int, Rotary] | None = None


@dataclass(frozen=True)
class Context:
    """What all blocks of one forward pass share; `timestep_B` only where the times are not read yet."""

    times: TimeMemory
    timestep_B: Tensor | None
    positions: Positions
    shared_expert: ffn.Vocabulary | None
    skip: Skip | None
    keep_KBN: Tensor | None


@dataclass(frozen=True)
class TokenState:
    """What a block takes and gives: tokens, their (rows, columns), and the query mask of the block before.

    On FlexDiT's sparse grid, `dense` is the state of all tokens, which waits to be recovered.
    """

    x_BND: Tensor
    grid: Grid
    mask_BN1: Tensor
    dense: TokenState | None = None


def modulate(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x)·(1 + scale) + shift, with a LayerNorm that has no parameters of its own."""
    return torch.addcmul(shift_B1D, F.layer_norm(x_BND, x_BND.shape[-1:], eps=eps), 1 + scale_B1D)


Prepare = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """A transformer block: a token state in, a token state out. `ffn` is None where it was pruned away."""

    def __init__(self, config: DiTConfig, index: int):
        super().__init__()
        D = config.width
        self.index = index
        self.eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.empty(6, D))
        self.self_attention = self.make_attention(config)
        self.cross_attention = CrossAttention(D, config.heads) if config.text_width else None
        self.query_mask = None
        if config.mask != "none":
            self.query_mask = mask.QueryMask(D, config.mask, config.mask_hidden)
        self.ffn = None
        if index not in config.removed_ffns:
            self.ffn = ffn.Vocabulary(D, ffn.local_size(config.ffn, D, config.shared_width, index, config.depth))

    def forward(self, state: TokenState, context: Context, text: PackedText | Runs) -> TokenState:
        """The state after this block; `text` is the projected captions, or what its cross-attention's `read` made of them."""
        modulation = (self.scale_shift_table + context.times.modulation_B6D).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        state, attended = self.attend(state, lambda x: modulate(x, shift_msa, scale_msa, self.eps), context.positions)
        x, m = torch.addcmul(state.x_BND, gate_msa, attended), state.mask_BN1
        if self.cross_attention is not None:
            x = x + self.cross_attention(x, text)
        if self.query_mask is not None:
            # On a sparse grid the first of the draws serve.
            keep = None if context.keep_KBN is None else context.keep_KBN[self.index, :, : x.shape[1], None]
            m = self.query_mask(x, m, *self.mask_time(context), keep)
        if self.ffn is not None:
            z, vocabulary = modulate(x, shift_mlp, scale_mlp, self.eps), self._vocabulary(context.shared_expert)
            skip = context.skip
            update = vocabulary(z) if skip is None else on_kept(vocabulary, z, skip.keep(m.squeeze(-1)))
            gate = gate_mlp if self.query_mask is None else m * gate_mlp
            x = torch.addcmul(x, gate, update)
        return replace(state, x_BND=x, mask_BN1=m)

    def make_attention(self, config: DiTConfig) -> nn.Module:
        return SelfAttention(config.width, config.heads)

    def attend(self, state: TokenState, prepare: Prepare, positions: Positions) -> tuple[TokenState, Tensor]:
        """The state that the block goes on with, and attention's update [B, N, D] of it.

        Args:
            prepare: normalises and modulates tokens.
        """
        return state, self.self_attention(prepare(state.x_BND), positions.tokens)

    def mask_time(self, context: Context) -> tuple[Tensor, Tensor]:
        """The query mask's scale and shift, from what was read of the times or made now."""
        if context.times.masks is not None:
            return context.times.masks[self.index]
        assert self.query_mask is not None and context.timestep_B is not None
        return self.query_mask.read_time(context.times.time_BD, context.timestep_B)

    def _vocabulary(self, shared: ffn.Vocabulary | None) -> Callable[[Tensor], Tensor]:
        """The block's own expert, plus the shared one where there is one."""
        own = self.ffn
        assert own is not None
        return own if shared is None else lambda z: own(z) + shared(z)


class MediatorBlock(Block):
    """Attends through mediators."""

    def make_attention(self, config: DiTConfig) -> nn.Module:
        return MediatorAttention(config.width, config.heads, config.mediators)

    def attend(self, state: TokenState, prepare: Prepare, positions: Positions) -> tuple[TokenState, Tensor]:
        assert positions.mediators is not None
        number, rotary = positions.mediators
        return state, self.self_attention(prepare(state.x_BND), state.grid, positions.tokens, rotary, number)


class PoolingBlock(Block):
    """Gives every token the mean of all."""

    def make_attention(self, config: DiTConfig) -> nn.Module:
        return MeanAttention(config.width)

    def attend(self, state: TokenState, prepare: Prepare, positions: Positions) -> tuple[TokenState, Tensor]:
        return state, self.self_attention(prepare(state.x_BND))


class SparseBlock(Block):
    """An ordinary block on the sparse grid."""

    def attend(self, state: TokenState, prepare: Prepare, positions: Positions) -> tuple[TokenState, Tensor]:
        assert positions.cells is not None
        return state, self.self_attention(prepare(state.x_BND), positions.cells[1])


class GenerateBlock(Block):
    """Pools the tokens to the sparse grid, whose tokens attend to all."""

    def make_attention(self, config: DiTConfig) -> nn.Module:
        return CrossScaleAttention(config.width, config.heads)

    def attend(self, state: TokenState, prepare: Prepare, positions: Positions) -> tuple[TokenState, Tensor]:
        assert positions.cells is not None
        cells, rotary = positions.cells
        x_BnD, mask_Bn1 = pool(state.x_BND, state.grid, cells), pool(state.mask_BN1, state.grid, cells)
        sparse = TokenState(x_BnD, cells, mask_Bn1, dense=state)
        return sparse, self.self_attention(prepare(x_BnD), rotary, prepare(state.x_BND), positions.tokens)


class RecoverBlock(Block):
    """Adds the sparse tokens to all tokens, y = W1 · spread(sparse) + W2 · x, which then attend to them.

    At the start W1 = 0 and W2 = I. That the keys and values are normalised and modulated as the queries are is a reading.
    """

    def __init__(self, config: DiTConfig, index: int):
        super().__init__(config, index)
        self.from_sparse = nn.Linear(config.width, config.width)
        self.from_dense = nn.Linear(config.width, config.width)

    def make_attention(self, config: DiTConfig) -> nn.Module:
        return CrossScaleAttention(config.width, config.heads)

    def attend(self, state: TokenState, prepare: Prepare, positions: Positions) -> tuple[TokenState, Tensor]:
        dense = state.dense
        assert dense is not None and positions.cells is not None
        y_BND = self.from_sparse(spread(state.x_BND, state.grid, dense.grid)) + self.from_dense(dense.x_BND)
        back = TokenState(y_BND, dense.grid, spread(state.mask_BN1, state.grid, dense.grid))
        rotary = positions.cells[1]
        return back, self.self_attention(prepare(y_BND), positions.tokens, prepare(state.x_BND), rotary)


BLOCKS: tuple[type[Block], ...] = (Block, MediatorBlock, PoolingBlock, GenerateBlock, SparseBlock, RecoverBlock)


def make_blocks(config: DiTConfig) -> list[Block]:
    """The blocks of a shape, from bottom to top."""
    kinds: dict[str, type[Block]] = {
        density.DENSE: MediatorBlock if config.attention == "mediators" else Block,
        density.POOLING: PoolingBlock,
        density.GENERATE: GenerateBlock,
        density.SPARSE: SparseBlock,
        density.RECOVER: RecoverBlock,
    }
    roles = density.roles(config.density, config.depth, config.split)
    return [kinds[role](config, index) for index, role in enumerate(roles)]
