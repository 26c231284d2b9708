"""Conditioning of the blocks: the time and the text, made by the backbone before its forward pass and handed to it.

Letters: B images (or captions), S timesteps, D width, h heads, L a caption's tokens, M all captions' tokens, d a head's width.

Two parts make it, for the same forward pass. In training `StepConditioning` (dit.py) makes each block's keys and values when
the block is reached, so that with `recompute` they are recomputed like the block's other activations: kept for all blocks at
once they would add nearly the memory of the blocks' inputs (at 256 px 2 · 120 vectors a caption beside 256 tokens). In
sampling `CachedConditioning` has them from caches, made once: `TextCache` once per prompt, `TimeCache` once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pretrain.models.compute_budget import ComputeBudget


@dataclass(frozen=True)
class Segment:
    """Keys and values [b, h, L, d] of b neighbouring captions of one length L, or padded to it.

    Attributes:
        keep: [b, 1, 1, L], True where a padded caption has a token; None without padding.
    """

    keys: Tensor
    values: Tensor
    keep: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: list[int]) -> Segment:
        """Some of the captions."""
        return Segment(self.keys[rows], self.values[rows], None if self.keep is None else self.keep[rows])

    def repeat(self, times: int) -> Segment:
        """One caption `times` times, without a copy."""
        parts = (self.keys, self.values, self.keep)
        return Segment(*(None if part is None else part.expand(times, -1, -1, -1) for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Unpadded:
    """Keys and values [M, h, d] of all captions end to end, for a kernel that takes unequal lengths.

    Attributes:
        starts: [B + 1] in int32, the place of each caption's first token among the M, and M.
        longest: no caption has more tokens.
    """

    keys: Tensor
    values: Tensor
    starts: Tensor
    longest: int


# All captions of a batch for one cross-attention, in order.
KeysValues = tuple[Segment, ...]


@dataclass(frozen=True)
class BlockConditioning:
    """One block's conditioning.

    Attributes:
        modulation_B6D: the modulation that all blocks share; B may be 1 for all images.
        mask_modulation: scale and shift [B, 1, D] of the block's query mask; None without one.
        text: keys and values of the block's cross-attention; () without text.
    """

    modulation_B6D: Tensor
    mask_modulation: tuple[Tensor, Tensor] | None
    text: KeysValues | Unpadded


class Conditioning(Protocol):
    """The conditioning of all blocks, for `len` images."""

    def __len__(self) -> int: ...

    @property
    def time_BD(self) -> Tensor:
        """The time embedding."""
        ...

    def for_block(self, index: int) -> BlockConditioning: ...

    def default_budget(self) -> ComputeBudget:
        """The compute budget at the images' noise levels."""
        ...


# ---- for sampling: from caches ----


@dataclass(frozen=True)
class TextCache:
    """Captions as the blocks' cross-attentions see them: made once per prompt, for all sampling steps.

    Attributes:
        blocks: each block's keys and values; () for a backbone without text.
        captions: the number of captions.
    """

    blocks: tuple[KeysValues, ...]
    captions: int

    def __len__(self) -> int:
        return self.captions

    def __add__(self, other: TextCache) -> TextCache:
        """The captions of both, this one's first."""
        blocks = tuple(mine + others for mine, others in zip(self.blocks, other.blocks, strict=True))
        return TextCache(blocks, len(self) + len(other))

    def __mul__(self, times: int) -> TextCache:
        """One caption repeated `times` times, without a copy."""
        assert len(self) == 1, "only a single caption can be repeated"
        return TextCache(tuple(tuple(s.repeat(times) for s in segments) for segments in self.blocks), times)

    def take(self, captions: Sequence[int]) -> TextCache:
        """Takes some of the captions, by their numbers in ascending order."""
        numbers = list(captions)
        assert numbers == sorted(set(numbers)) and set(numbers) <= set(range(len(self))), f"{numbers} of {len(self)}"
        blocks = []
        for segments in self.blocks:
            kept, start = [], 0
            for segment in segments:
                rows = [n - start for n in numbers if start <= n < start + len(segment)]
                start += len(segment)
                if len(rows) == len(segment):
                    kept.append(segment)
                elif rows:
                    kept.append(segment.take(rows))
            blocks.append(tuple(kept))
        return TextCache(tuple(blocks), len(numbers))


@dataclass(frozen=True)
class TimeCache:
    """One timestep as the backbone sees it, for any number of images at that time.

    Attributes:
        time_1D: the time embedding [1, D].
        modulation_16D: the blocks' shared modulation [1, 6, D].
        masks: scale and shift [1, 1, D] of each block's query mask; () without query masks.
        budget: the default compute budget at this time.
    """

    time_1D: Tensor
    modulation_16D: Tensor
    masks: tuple[tuple[Tensor, Tensor], ...]
    budget: ComputeBudget


@dataclass(frozen=True)
class CachedConditioning:
    """One timestep for all captions, from caches."""

    time: TimeCache
    text: TextCache

    def __len__(self) -> int:
        return len(self.text)

    @property
    def time_BD(self) -> Tensor:
        return self.time.time_1D

    def for_block(self, index: int) -> BlockConditioning:
        masks = self.time.masks
        return BlockConditioning(self.time.modulation_16D, masks[index] if masks else None, self.text.blocks[index])

    def default_budget(self) -> ComputeBudget:
        return self.time.budget
