"""Attention among the image's tokens, and from them to the text.

Letters: B images, N image tokens, M text tokens of all captions, L the longest caption's, D width, h heads, d a head's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.models.embeddings import Rotary
from pretrain.models.text import PackedText, Runs

KINDS = ("full", "mediators")


class SelfAttention(nn.Module):
    """Full attention among [B, N, D] tokens, with rotary positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, rotary: Rotary) -> Tensor:
        q, k, v = rearrange(self.qkv(x_BND), "B N (three h d) -> three B h N d", three=3, h=self.heads)
        y_BhNd = F.scaled_dot_product_attention(rotary.turn(q), rotary.turn(k), v)
        return self.out(rearrange(y_BhNd, "B h N d -> B N (h d)"))


class CrossScaleAttention(SelfAttention):
    """Attention from [B, N, D] tokens of one scale to [B, n, D] of another, with self-attention's parameters."""

    def forward(self, x_BND: Tensor, rotary: Rotary, from_BnD: Tensor, rotary_from: Rotary) -> Tensor:  # type: ignore[override]
        """The update [B, N, D] of `x_BND`; queries and keys are turned by their own scale's positions."""
        D = x_BND.shape[-1]
        q_weight, kv_weight = self.qkv.weight.split([D, 2 * D])
        q_bias, kv_bias = self.qkv.bias.split([D, 2 * D])
        q = rearrange(F.linear(x_BND, q_weight, q_bias), "B N (h d) -> B h N d", h=self.heads)
        kv_BnX = F.linear(from_BnD, kv_weight, kv_bias)
        k, v = rearrange(kv_BnX, "B n (two h d) -> two B h n d", two=2, h=self.heads)
        y_BhNd = F.scaled_dot_product_attention(rotary.turn(q), rotary_from.turn(k), v)
        return self.out(rearrange(y_BhNd, "B h N d -> B N (h d)"))


class MeanAttention(nn.Module):
    """What attention with equal weights gives: every token receives the mean of all values, [B, 1, D].

    The mean of the values is the value of the mean, so one token is projected instead of N.
    """

    def __init__(self, width: int):
        super().__init__()
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.out(self.value(x_BND.mean(1, keepdim=True)))


class CrossAttention(nn.Module):
    """Attention from [B, N, D] image tokens to each image's own caption; keys and values are made of real tokens only.

    The caption is given as its projected tokens, or as what `read` made of them: that spares their keys and values at
    every sampling step but the first, and all padding.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def read(self, text: PackedText) -> Runs:
        """The captions' keys and values, once and for all steps."""
        runs = text.runs()
        parts = self.kv(text.tokens_ME).split([captions * length for captions, length in runs])
        pattern = "(b L) (two h d) -> two b h L d"
        return tuple(
            tuple(rearrange(part, pattern, two=2, h=self.heads, L=length).unbind())
            for part, (_, length) in zip(parts, runs, strict=True)
        )

    def forward(self, x_BND: Tensor, text: PackedText | Runs) -> Tensor:
        """The update [B, N, D] of the image tokens; `text` is the projected captions, or what `read` made of them."""
        q_BhNd = rearrange(self.q(x_BND), "B N (h d) -> B h N d", h=self.heads)
        if isinstance(text, PackedText):
            kv_BLX = text.pad(self.kv(text.tokens_ME))
            k, v = rearrange(kv_BLX, "B L (two h d) -> two B h L d", two=2, h=self.heads)
            keep = None if text.keep_BL is None else text.keep_BL[:, None, None, :]
            y_BhNd = F.scaled_dot_product_attention(q_BhNd, k, v, attn_mask=keep)
        else:
            queries = q_BhNd.split([len(keys) for keys, _ in text])
            y_BhNd = torch.cat(
                [F.scaled_dot_product_attention(q, k, v) for q, (k, v) in zip(queries, text, strict=True)]
            )
        return self.out(rearrange(y_BhNd, "B h N d -> B N (h d)"))
