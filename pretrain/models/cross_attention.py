"""Attention from the image's tokens to the text.

Letters: B images, N image tokens, M text tokens of all captions, L a caption's tokens, D width, h heads, d a head's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from pretrain.models.conditioning import KeysValues, Segment, Unpadded
from pretrain.models.text import PackedText

# A bound of captions' lengths that does not change with the batch, so that compiled code needs not be compiled again.
LONGEST = 512


class CrossAttention(nn.Module):
    """Attention from [B, N, D] image tokens to each image's own caption; projections are made of real tokens only."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def initialise(self) -> None:
        """Outputs 0: a fresh block changes nothing."""
        nn.init.zeros_(self.out.weight)

    def for_training(self, text: PackedText) -> KeysValues | Unpadded:
        """Keys and values of projected captions: one attention for all, without padding where the device can."""
        return self.unpadded(text) if takes_unequal_lengths(text.tokens_ME, self.head_width) else self.padded(text)

    def unpadded(self, text: PackedText) -> Unpadded:
        """Keys and values of projected captions as they are, end to end."""
        k, v = rearrange(self.kv(text.tokens_ME), "M (two h d) -> two M h d", two=2, h=self.heads)
        return Unpadded(k, v, text.starts, max(LONGEST, *text.lengths))

    def padded(self, text: PackedText) -> KeysValues:
        """Keys and values of projected captions, padded to the text's rectangle."""
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

    def forward(self, x_BND: Tensor, text: KeysValues | Unpadded) -> Tensor:
        """The update [B, N, D] of the image tokens."""
        q_BNhd = rearrange(self.q(x_BND), "B N (h d) -> B N h d", h=self.heads)
        y_BNhd = attend_unpadded(q_BNhd, text) if isinstance(text, Unpadded) else attend(q_BNhd, text)
        return self.out(y_BNhd.flatten(2))


def attend(q_BNhd: Tensor, text: KeysValues) -> Tensor:
    """Attention [B, N, h, d] to captions in segments."""
    updates = [
        F.scaled_dot_product_attention(q, segment.keys, segment.values, attn_mask=segment.keep)
        for q, segment in zip(q_BNhd.transpose(1, 2).split([len(s) for s in text]), text, strict=True)
    ]
    y_BhNd = updates[0] if len(updates) == 1 else torch.cat(updates)
    return y_BhNd.transpose(1, 2)


def attend_unpadded(q_BNhd: Tensor, text: Unpadded) -> Tensor:
    """Attention [B, N, h, d] to captions laid end to end, by torch's kernel for unequal lengths."""
    B, N = q_BNhd.shape[:2]
    starts = torch.arange(0, (B + 1) * N, N, device=q_BNhd.device, dtype=torch.int32)
    y = varlen_attn(q_BNhd.flatten(0, 1), text.keys, text.values, starts, text.starts, N, text.longest)
    assert isinstance(y, Tensor)
    return y.unflatten(0, (B, N))


def takes_unequal_lengths(like: Tensor, head_width: int) -> bool:
    """True where torch's kernel for unequal lengths serves tensors such as `like`: FlashAttention's conditions.

    Its backward pass adds up in any order, so with deterministic algorithms captions are padded.
    """
    return (
        like.is_cuda
        and like.dtype in (torch.float16, torch.bfloat16)
        and head_width % 8 == 0
        and head_width <= 128
        and torch.version.hip is None
        and torch.cuda.get_device_capability(like.device) >= (8, 0)
        and not torch.are_deterministic_algorithms_enabled()
    )
