"""A transformer block, and what all blocks of one forward pass share.

Letters: B images, N tokens, D width, K blocks.

One block (FocusDiT, §4):

    x += gate_msa · SelfAttention(LN(x)·(1 + scale_msa) + shift_msa)
    x += CrossAttention(x, text)                       its input is not normalised
    m  = QueryMask(x, m, t)                            Eq. 2; `mask: none` leaves it out
    x += m · gate_mlp · FFN(LN(x)·(1 + scale_mlp) + shift_mlp)      Eq. 3: the mask weights the FFN's output

The six modulations are the block's own 6 × D table plus one projection of the time that all blocks share (AdaLN-single).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models import ffn, mask
from pretrain.models.attention import CrossAttention, SelfAttention
from pretrain.models.config import DiTConfig
from pretrain.models.embeddings import Rotary
from pretrain.models.skip import Skip, on_kept
from pretrain.models.text import PackedText, Runs


@dataclass(frozen=True)
class TimeMemory:
    """All that follows from the times alone, for B images or (B = 1) for all of them: made once for all sampling steps.

    Attributes:
        time_BD: the time embedding.
        modulation_B6D: the blocks' shared modulation.
        masks: each block's scale and shift [B, 1, D] of its query mask; None without query masks, and in training, where
            each block makes its own.
    """

    time_BD: Tensor
    modulation_B6D: Tensor
    masks: tuple[tuple[Tensor, Tensor], ...] | None = None


@dataclass(frozen=True)
class Context:
    """What all blocks of one forward pass share; `timestep_B` only where the times are not read yet."""

    times: TimeMemory
    timestep_B: Tensor | None
    rotary: Rotary
    shared_expert: ffn.Vocabulary | None
    skip: Skip | None
    keep_KBN: Tensor | None


@dataclass(frozen=True)
class TokenState:
    """What a block takes and gives: tokens, their (rows, columns), and the query mask of the block before."""

    x_BND: Tensor
    grid: tuple[int, int]
    mask_BN1: Tensor


def modulate(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x)·(1 + scale) + shift, with a LayerNorm that has no parameters of its own."""
    return torch.addcmul(shift_B1D, F.layer_norm(x_BND, x_BND.shape[-1:], eps=eps), 1 + scale_B1D)


class Block(nn.Module):
    """A transformer block: a token state in, a token state out. `ffn` is None where it was pruned away."""

    def __init__(self, config: DiTConfig, index: int):
        super().__init__()
        D = config.width
        self.index = index
        self.eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.empty(6, D))
        self.self_attention = SelfAttention(D, config.heads)
        self.cross_attention = CrossAttention(D, config.heads)
        self.query_mask = None
        if config.mask != "none":
            self.query_mask = mask.QueryMask(D, config.mask, config.mask_hidden)
        self.ffn = None
        if index not in config.removed_ffns:
            self.ffn = ffn.Vocabulary(D, ffn.local_size(config.ffn, D, config.shared_width, index, config.depth))

    def forward(self, state: TokenState, context: Context, text: PackedText | Runs) -> TokenState:
        x, m = state.x_BND, state.mask_BN1
        modulation = (self.scale_shift_table + context.times.modulation_B6D).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        attended = self.self_attention(modulate(x, shift_msa, scale_msa, self.eps), context.rotary)
        x = torch.addcmul(x, gate_msa, attended)
        x = x + self.cross_attention(x, text)
        if self.query_mask is not None:
            keep = None if context.keep_KBN is None else context.keep_KBN[self.index, ..., None]
            m = self.query_mask(x, m, *self.mask_time(context), keep)
        if self.ffn is not None:
            z, vocabulary = modulate(x, shift_mlp, scale_mlp, self.eps), self._vocabulary(context.shared_expert)
            skip = context.skip
            update = vocabulary(z) if skip is None else on_kept(vocabulary, z, skip.keep(m.squeeze(-1)))
            gate = gate_mlp if self.query_mask is None else m * gate_mlp
            x = torch.addcmul(x, gate, update)
        return replace(state, x_BND=x, mask_BN1=m)

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
