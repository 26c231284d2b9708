"""Attention from the image's tokens to the text.

Letters: B images, N image tokens, M text tokens of all captions, L a caption's tokens, D width, h heads, d a head's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.models.conditioning import KeysValues, Segment
from pretrain.models.text import PackedText


class CrossAttention(nn.Module):
    """Attention from [B, N, D] image tokens to each image's own caption; projections are made of real tokens only."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def initialise(self) -> None:
        """Outputs 0: a fresh block changes nothing."""
        nn.init.zeros_(self.out.weight)

    def padded(self, text: PackedText) -> KeysValues:
        """Keys and values of projected captions, padded to the longest: one attention for all, for training."""
        kv_BLX = text.pad(self.kv(text.tokens_ME))
        k, v = rearrange(kv_BLX, "B L (two h d) -> two B h L d", two=2, h=self.heads)
        return (Segment(k, v, None if text.keep_BL is None else text.keep_BL[:, None, None, :]),)

    def by_length(self, text: PackedText) -> KeysValues:
        """Keys and values of projected captions, without padding: one attention for each run of equal lengths, for sampling."""
        runs = text.runs()
        parts = self.kv(text.tokens_ME).split([captions * length for captions, length in runs])
        pattern = "(b L) (two h d) -> two b h L d"
        return tuple(
            Segment(*rearrange(part, pattern, two=2, h=self.heads, L=length).unbind())
            for part, (_, length) in zip(parts, runs, strict=True)
        )

    def forward(self, x_BND: Tensor, text: KeysValues) -> Tensor:
        """The update [B, N, D] of the image tokens."""
        q_BhNd = rearrange(self.q(x_BND), "B N (h d) -> B h N d", h=self.heads)
        updates = [
            F.scaled_dot_product_attention(q, segment.keys, segment.values, attn_mask=segment.keep)
            for q, segment in zip(q_BhNd.split([len(s.keys) for s in text]), text, strict=True)
        ]
        y_BhNd = updates[0] if len(updates) == 1 else torch.cat(updates)
        return self.out(rearrange(y_BhNd, "B h N d -> B N (h d)"))
