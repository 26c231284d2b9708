"""A transformer block, and what all blocks of one forward pass share.

Letters: B images, N tokens, D width.

One block (FocusDiT, §4):

    x += gate_msa · TokenMixer(LN(x)·(1 + scale_msa) + shift_msa)
    x += CrossAttention(x, text)                       its input is not normalised
    m  = QueryMask(x, m, t)                            Eq. 2; `mask: none` leaves it out
    x += m · gate_mlp · FFN(LN(x)·(1 + scale_mlp) + shift_mlp)      Eq. 3: the mask weights the FFN's output

The six modulations are the block's own 6 × D table plus one projection of the time that all blocks share (AdaLN-single). The
token mixer is self-attention in the plain DiT; `mixers/` has the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pretrain.models.conditioning import BlockConditioning
from pretrain.models.config import DiTConfig
from pretrain.models.cross_attention import CrossAttention
from pretrain.models.focusdit import ffn, mask
from pretrain.models.focusdit.skip import Skip, apply_to_kept
from pretrain.models.mixers.base import Modulation, Positions, TokenMixer, TokenState


@dataclass(frozen=True)
class Shared:
    """Values that all blocks of one forward pass share."""

    positions: Positions
    expert: ffn.Vocabulary | None
    skip: Skip | None


class Block(nn.Module):
    """A transformer block: a token state in, a token state out. `ffn` is None where it was pruned away."""

    def __init__(self, config: DiTConfig, index: int, mixer: TokenMixer):
        super().__init__()
        D = config.width
        self.eps = config.norm_eps
        self.mixer = mixer
        self.scale_shift_table = nn.Parameter(torch.empty(6, D))
        self.self_attention = mixer.attention
        self.cross_attention = CrossAttention(D, config.heads) if config.text_width else None
        self.query_mask = None
        if config.mask != "none":
            self.query_mask = mask.QueryMask(D, config.mask, config.mask_hidden, config.mask_previous)
        self.ffn = None
        if index not in config.removed_ffns:
            self.ffn = ffn.Vocabulary(D, ffn.local_size(config.ffn, D, config.shared_width, index, config.depth))
        for name, module in mixer.extra.items():
            self.add_module(name, module)

    def initialise(self) -> None:
        """Gates 1, the rest of the table normal(1/√D); and the mixer's own start."""
        nn.init.normal_(self.scale_shift_table, std=self.scale_shift_table.shape[1] ** -0.5)
        with torch.no_grad():
            self.scale_shift_table[[2, 5]] = 1.0  # gate_msa, gate_mlp
        self.mixer.initialise()

    def forward(
        self, state: TokenState, conditioning: BlockConditioning, shared: Shared, keep_BN: Tensor | None = None
    ) -> TokenState:
        """The state after this block; `keep_BN` is dropout of its query mask, on the grid of all tokens."""
        modulation = (self.scale_shift_table + conditioning.modulation_B6D).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        state, mixed = self.mixer.mix(state, Modulation(shift_msa, scale_msa, self.eps), shared.positions)
        x, m = torch.addcmul(state.x_BND, gate_msa, mixed), state.mask_BN1
        if self.cross_attention is not None:
            x = x + self.cross_attention(x, conditioning.text)
        if self.query_mask is not None:
            assert conditioning.mask_modulation is not None
            # On a coarser grid the first of the draws serve.
            keep = None if keep_BN is None else keep_BN[:, : x.shape[1], None]
            m = self.query_mask(x, m, *conditioning.mask_modulation, keep)
        if self.ffn is not None:
            z, vocabulary = Modulation(shift_mlp, scale_mlp, self.eps).apply(x), self._vocabulary(shared.expert)
            skip = shared.skip
            update = vocabulary(z) if skip is None else apply_to_kept(vocabulary, z, skip.keep(m.squeeze(-1)))
            gate = gate_mlp if self.query_mask is None else m * gate_mlp
            x = torch.addcmul(x, gate, update)
        return replace(state, x_BND=x, mask_BN1=m)

    def _vocabulary(self, shared: ffn.Vocabulary | None) -> Callable[[Tensor], Tensor]:
        """The block's own expert, plus the shared one where there is one."""
        own = self.ffn
        assert own is not None
        return own if shared is None else lambda z: own(z) + shared(z)
