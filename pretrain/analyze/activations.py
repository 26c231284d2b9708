"""Entries of the FFN vocabulary that tokens activate, counted while a model computes (FocusDiT, §3).

An entry is activated by a token where the GELU of its key is above 0, which is where the key itself is. Counts are exact and take
the same memory for any number of tokens: a counter for each entry, and one for each number of entries that a token can activate.

Letters: B pictures, N tokens, C entries of a block's vocabulary (the own expert's, then the shared one's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pretrain.models import DiT
from pretrain.models.grids import Grid
from pretrain.models.mixers.base import TokenState

Receive = Callable[[int, Tensor, Grid], None]


@contextmanager
def watched(dit: DiT, receive: Receive, halves: int) -> Iterator[None]:
    """Calls `receive(block, keys_BNC, grid)` after each block that has an FFN, in every forward pass without skipping.

    `halves`: of a batch, the first of which is given: with guidance, where it is 2, the second has no captions.
    """
    keys: list[Tensor] = []

    def finish(block: int) -> Callable[[Any, Any, TokenState], None]:
        def hook(module: Any, inputs: Any, state: TokenState) -> None:
            if keys:
                receive(block, torch.cat([key[: len(key) // halves] for key in keys], dim=-1), state.grid)
                keys.clear()

        return hook

    blocks = [dit.block(index) for index in range(len(dit.blocks))]
    experts = [*(block.ffn for block in blocks), dit.shared_expert]
    hooks = [e.key.register_forward_hook(lambda m, i, key: keys.append(key)) for e in experts if e is not None]
    hooks += [block.register_forward_hook(finish(index)) for index, block in enumerate(blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Tally:
    """Counts of one block's activations.

    Attributes:
        by_active: tokens that activate 0, 1, … C entries, and last those with a key that is NaN [C + 2].
        by_entry: tokens that activate each entry [C].
        damaged: entries with a key that was NaN [C].
        tokens: all tokens.
    """

    def __init__(self, entries: int, device: torch.device):
        self.by_active = torch.zeros(entries + 2, dtype=torch.int64, device=device)
        self.by_entry = torch.zeros(entries, dtype=torch.int64, device=device)
        self.damaged = torch.zeros(entries, dtype=torch.bool, device=device)
        self.tokens = 0

    def add(self, keys_BNC: Tensor) -> None:
        """Counts a forward pass."""
        keys_MC = keys_BNC.flatten(0, 1)
        active_MC, nan_MC = keys_MC > 0, keys_MC.isnan()
        active_M = active_MC.sum(1).masked_fill(nan_MC.any(1), len(self.by_active) - 1)
        self.by_active += torch.bincount(active_M, minlength=len(self.by_active))
        self.by_entry += active_MC.sum(0)
        self.damaged |= nan_MC.any(0)
        self.tokens += len(keys_MC)

    def utilize(self, shares: Sequence[float]) -> tuple[list[float], float, float]:
        """R_utilize of the tokens at shares 0..1 of the way from the highest to the lowest; its mean and spread over the tokens.

        NaNs stand first; with any, mean and spread are NaN.
        """
        entries = len(self.by_entry)
        # The highest first; tokens with a NaN before all.
        ratio = torch.tensor([*(k / entries for k in range(entries + 1)), float("nan")], dtype=torch.float64).flip(0)
        count = self.by_active.cpu().flip(0)
        ends = count.cumsum(0)
        places = torch.tensor([round(share * (self.tokens - 1)) for share in shares])
        sorted_values = ratio[torch.searchsorted(ends, places, right=True)]
        there = count > 0
        mean = (ratio[there] * count[there]).sum() / self.tokens
        variance = ((ratio[there] - mean) ** 2 * count[there]).sum() / self.tokens
        return sorted_values.tolist(), mean.item(), variance.sqrt().item()

    def retrieve(self, shares: Sequence[float]) -> tuple[list[float], float, float]:
        """R_retrieve of the entries, likewise."""
        ratio = (self.by_entry.double() / self.tokens).masked_fill(self.damaged, float("nan")).cpu()
        ordered = ratio.sort(descending=True).values  # torch sorts NaN as the highest
        places = [round(share * (len(ordered) - 1)) for share in shares]
        return ordered[places].tolist(), ratio.mean().item(), ratio.std(correction=0).item()

    def seldom(self, under: float) -> float:
        """The share of entries that less than this share of the tokens activate; NaN where a key was NaN."""
        if self.damaged.any():
            return float("nan")
        return (self.by_entry.double() / self.tokens < under).double().mean().item()
