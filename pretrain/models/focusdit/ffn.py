"""The feed-forward network, seen as a key-value vocabulary (FocusDiT, §3), and its three layouts.

Letters: B images, N tokens, D width. A vocabulary of size C is Linear(D, C), GELU (tanh), Linear(C, D).

- `uniform`: 4D entries in every block: the DiT baseline.
- `shared` (Eq. 5, Vocabulary Redistribution): a local expert of (4 − s)·D entries per block, and one expert of s·D
  entries that all blocks share; their outputs add up, and the output bias is the block's own.
- `tapered` (the authors' release): nothing shared; few entries at both ends, many in the middle, 4D on average.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

LAYOUTS = ("uniform", "shared", "tapered")


class Vocabulary(nn.Module):
    """`size` key-value entries over width D. `bias=False` leaves out the output's bias only."""

    def __init__(self, width: int, size: int, bias: bool = True):
        super().__init__()
        self.key = nn.Linear(width, size)
        self.value = nn.Linear(size, width, bias=bias)

    def initialise(self) -> None:
        """Outputs 0: a fresh block changes nothing."""
        nn.init.zeros_(self.value.weight)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.value(F.gelu(self.key(x_BND), approximate="tanh"))


def local_size(layout: str, width: int, shared_width: int, block: int, depth: int) -> int:
    """The vocabulary entries of block number `block`'s own (not shared) expert."""
    if layout == "uniform":
        return 4 * width
    if layout == "shared":
        return (4 - shared_width) * width
    if layout == "tapered":
        step = 2 * width // max((depth - 1) // 2, 1)
        return 3 * width + min(block, depth - 1 - block) * step
    raise ValueError(f"unknown FFN layout {layout!r}; the layouts are {', '.join(LAYOUTS)}")
