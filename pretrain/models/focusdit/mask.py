"""Q-MaskGen: which tokens shall query the FFN's vocabulary, and how much (FocusDiT, §4.1, Eq. 2).

Letters: B images, N tokens, D width.

    m_i = MLP(norm(x, t), m_{i−1}) in (0, 1),   m_0 = 1

The input is the cross-attention's output; the mask of the block before enters every layer of the MLP, and gradients flow
back through it. Two kinds differ in how the time t enters:

- `release`: what the authors trained. Each block has a table of 1001 × D time embeddings and a Linear(D, 2D): 88% of
  Q-MaskGen's 0.199B parameters.
- `adaln_single`: what the paper's text says. Each block has a 2 × D table over the backbone's time embedding: 0.024B.

Without the previous mask (Table 3, rows B and C) a block's mask depends on its own tokens and the time alone.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("none", "release", "adaln_single")
OPTIONAL_PARAMETERS = (".query_mask.",)  # they come and go with the setting
TIMESTEPS = 1000  # the table has one row for each integer timestep 0..1000


class MaskLinear(nn.Module):
    """Linear over [input, previous mask]: the mask's column is kept apart, so that no concatenation is made.

    `previous=False` leaves the mask's column out.
    """

    def __init__(self, inputs: int, outputs: int, previous: bool = True):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.premask = nn.Parameter(torch.zeros(outputs)) if previous else None

    def forward(self, x_BNX: Tensor, mask_BN1: Tensor) -> Tensor:
        y_BNX = self.linear(x_BNX)
        return y_BNX if self.premask is None else torch.addcmul(y_BNX, mask_BN1, self.premask)


class QueryMask(nn.Module):
    """Predicts a block's query mask [B, N, 1] from its tokens, the time and the block before's mask."""

    def __init__(self, width: int, kind: str, hidden: tuple[int, ...], previous: bool = True):
        super().__init__()
        if kind == "release":
            self.time_table = nn.Embedding(TIMESTEPS + 1, width)
            self.time_linear = nn.Linear(width, 2 * width)
        elif kind == "adaln_single":
            self.time_shift = nn.Parameter(torch.zeros(2, width))
        else:
            raise ValueError(f"unknown query mask {kind!r}; the kinds are {', '.join(KINDS)}")
        self.kind = kind
        sizes = (width, *hidden, 1)
        self.layers = nn.ModuleList(MaskLinear(i, o, previous) for i, o in pairwise(sizes[:-1]))
        self.last = MaskLinear(sizes[-2], 1, previous)

    def initialise(self) -> None:
        """Last bias 2: masks start near 0.88, where their gradient still flows."""
        nn.init.constant_(self.last.linear.bias, 2.0)

    def embed_time(self, time_BD: Tensor, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift [B, 1, D] of the tokens at these times."""
        if self.kind == "release":
            # The table is indexed by the truncated timestep; the order is (scale, shift), as the release has it.
            row_BD = self.time_table(timestep_B.long().clamp(0, TIMESTEPS))
            scale, shift = self.time_linear(F.silu(row_BD))[:, None].chunk(2, dim=-1)
        else:
            scale, shift = (self.time_shift + time_BD[:, None]).chunk(2, dim=1)
        return scale, shift

    def forward(
        self, x_BND: Tensor, mask_BN1: Tensor, scale: Tensor, shift: Tensor, keep_BN1: Tensor | None = None
    ) -> Tensor:
        """The mask from tokens [B, N, D], the mask before [B, N, 1], and `embed_time`'s results; `keep_BN1` is dropout."""
        h = torch.addcmul(shift, F.layer_norm(x_BND, x_BND.shape[-1:], eps=1e-5), 1 + scale)
        for layer in self.layers:
            h = F.relu(layer(h, mask_BN1))
        # Dropout acts on the mask itself, and the mask goes on to the next block as it is after dropout.
        mask = torch.sigmoid(self.last(h, mask_BN1))
        return mask if keep_BN1 is None else mask * keep_BN1


def dropout_factors(uniform_BX: Tensor, depth: int, dropout: float) -> Tensor:
    """The masks' dropout from uniform numbers, depth · tokens an image: 0 or 1 / (1 − dropout), [depth, B, tokens] in fp32."""
    keep_KBN = uniform_BX.unflatten(1, (depth, -1)).transpose(0, 1) >= dropout
    return keep_KBN.float() * (1 / (1 - dropout))


def macs(kind: str, width: int, hidden: tuple[int, ...], tokens: int) -> int:
    """Multiply-adds of one block's query mask for one image with this many tokens; 0 without query masks."""
    if kind == "none":
        return 0
    time = 2 * width**2 if kind == "release" else 0
    return tokens * sum(inputs * outputs for inputs, outputs in pairwise((width, *hidden, 1))) + time
