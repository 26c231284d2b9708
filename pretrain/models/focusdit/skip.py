"""Leaving out the FFN where the query mask weighs it little (FocusDiT, §6, Fig. 9); while sampling only.

Letters: B images, N tokens, D width, M tokens of all images, T the kept ones of them.

Two units: `layer` leaves out a block's whole FFN for each image whose mask's mean is under the threshold, as the paper does;
`token` leaves it out for each token whose mask is not above the threshold. Either way the kept tokens are gathered, go
through the FFN, and are scattered back: the work shrinks with them. How many are kept is known on the device only, so
each block waits for it once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

UNITS = ("token", "layer")
LOW = 0.15  # the paper's threshold for leaving an FFN out, §6


@dataclass(frozen=True)
class Skip:
    """A rule for leaving FFNs out: `threshold` in 0..1 of the query mask, and the unit that it judges."""

    threshold: float
    unit: str = "token"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"skip unit {self.unit!r} is none of {', '.join(UNITS)}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"skip threshold {self.threshold} must be in 0..1, as the query masks are")

    def keep(self, mask: Tensor) -> Tensor:
        """True for the tokens that go through the FFN, for masks of shape [..., N]."""
        if self.unit == "token":
            return mask > self.threshold
        return (mask.float().mean(-1, keepdim=True) >= self.threshold).expand_as(mask)


def apply_to_kept(function: Callable[[Tensor], Tensor], x_BND: Tensor, keep_BN: Tensor) -> Tensor:
    """`function` of the kept tokens, computed for them alone; 0 for the others."""
    index_T = keep_BN.flatten().nonzero().squeeze(1)
    if len(index_T) == keep_BN.numel():
        return function(x_BND)
    update_MD = x_BND.new_zeros(keep_BN.numel(), x_BND.shape[-1])
    if len(index_T):
        update_MD.index_copy_(0, index_T, function(x_BND.flatten(0, 1).index_select(0, index_T)))
    return update_MD.view_as(x_BND)
