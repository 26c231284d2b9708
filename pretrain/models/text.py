"""Unpadded text: the captions of a batch, laid end to end.

Letters: B captions, M tokens of all captions together, L the rectangle's tokens, E the text encoder's width, X any width.

Projections run on the M real tokens. In training attention takes them as they are, where the device has a kernel for unequal
lengths; elsewhere it sees a [B, L] rectangle, and a mask keeps it from the empty places. In sampling each run of equally long
captions is attended to by itself, without padding; compiled, they are padded to few lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch
from torch import Tensor

# For `PackedText.pack`: the usual cap of 300 tokens makes five lengths of the rectangle.
TEXT_MULTIPLE = 64


@dataclass(frozen=True)
class PackedText:
    """Token embeddings of B captions without padding.

    Attributes:
        tokens_ME: the embeddings of all captions, end to end.
        lengths: each caption's tokens, on the host (no device is asked for them).
        slot_M: each token's place in the flattened [B, L] rectangle.
        starts: [B + 1] in int32, the place of each caption's first token among the M, and M.
        keep_BL: True where the rectangle holds a token; None when it holds nothing else.
    """

    tokens_ME: Tensor
    lengths: tuple[int, ...]
    slot_M: Tensor
    starts: Tensor
    keep_BL: Tensor | None

    @classmethod
    def pack(cls, captions: Sequence[Tensor], multiple: int | None = None) -> PackedText:
        """Lays captions of shape [length, E] end to end.

        Args:
            multiple: L, the longest caption's length, is rounded up to a multiple of it, and the rectangle has a mask
                whatever the lengths: batches of few shapes, for compiled code.

        Raises:
            ValueError: a caption has no tokens.
        """
        lengths = tuple(len(c) for c in captions)
        if not lengths or min(lengths) == 0:
            raise ValueError("a caption has no tokens; even the empty caption has its end token")
        longest = max(lengths)
        L = longest if multiple is None else -(-longest // multiple) * multiple
        keep_BL = torch.arange(L) < torch.tensor(lengths)[:, None]
        slot_M = keep_BL.flatten().nonzero().squeeze(1)
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        full = multiple is None and min(lengths) == longest
        return cls(torch.cat(list(captions)), lengths, slot_M, starts, None if full else keep_BL).to(captions[0].device)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PackedText:
        """The same captions on `device`, the embeddings in `dtype`. From pinned memory the copy does not wait."""
        keep_BL = self.keep_BL if self.keep_BL is None else self.keep_BL.to(device, non_blocking=True)
        tokens_ME = self.tokens_ME.to(device, dtype, non_blocking=True)
        slot_M, starts = (t.to(device, non_blocking=True) for t in (self.slot_M, self.starts))
        return replace(self, tokens_ME=tokens_ME, slot_M=slot_M, starts=starts, keep_BL=keep_BL)

    def pin_memory(self) -> PackedText:
        """The same captions in page-locked host memory."""
        keep_BL = self.keep_BL if self.keep_BL is None else self.keep_BL.pin_memory()
        tokens_ME, slot_M, starts = (t.pin_memory() for t in (self.tokens_ME, self.slot_M, self.starts))
        return replace(self, tokens_ME=tokens_ME, slot_M=slot_M, starts=starts, keep_BL=keep_BL)

    def captions(self) -> tuple[Tensor, ...]:
        """The captions one by one, each [length, E]."""
        return self.tokens_ME.split(self.lengths)

    def runs(self) -> list[tuple[int, int]]:
        """(captions, their length) of each run of neighbouring captions of one length."""
        return [(len(list(group)), length) for length, group in groupby(self.lengths)]

    def __len__(self) -> int:
        return len(self.lengths)

    def __add__(self, other: PackedText) -> PackedText:
        """The captions of both, this one's first."""
        return PackedText.pack([*self.captions(), *other.captions()])

    def __mul__(self, times: int) -> PackedText:
        """The captions repeated `times` times."""
        return PackedText.pack(self.captions() * times)

    def with_tokens(self, tokens_MX: Tensor) -> PackedText:
        """The same layout around other values of the same tokens."""
        return replace(self, tokens_ME=tokens_MX)

    def pad(self, values_MX: Tensor) -> Tensor:
        """Spreads values of the tokens into the [B, L, X] rectangle, zeros elsewhere."""
        if self.keep_BL is None:
            return values_MX.unflatten(0, (len(self), self.lengths[0]))
        B, L = self.keep_BL.shape
        return (
            values_MX.new_zeros(B * L, values_MX.shape[-1]).index_copy(0, self.slot_M, values_MX).unflatten(0, (B, L))
        )
