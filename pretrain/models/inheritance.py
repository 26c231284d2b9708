"""What a model takes of a trained one whose settings differ.

What the settings add:

    pooling blocks' `value`                        the last third of the trained `qkv`
    mediators' tables and convolution              their own start
    FlexDiT's W1 and W2                            their own start, 0 and the identity: pooled-away tokens come back as they were
    query masks                                    their own start, near 0.88: close to no mask

What the settings leave out (a pooling block's queries and keys, mediators, query masks) is left behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor


@dataclass(frozen=True)
class DerivedParameter:
    """A parameter that a model without one of its name can be given: equal rows of another parameter.

    Attributes:
        source: the part of the other parameter's name that stands in place of the key in `derived_parameters`.
        part, parts: the rows are number `part`, from 0, of `parts` equal parts of the other's rows.
        description: words for the log.
    """

    source: str
    part: int
    parts: int
    description: str

    def fits(self, shape: tuple[int, ...], source_shape: tuple[int, ...] | None) -> bool:
        """Whether a parameter of this shape can be taken from one of that shape; from None it cannot."""
        return source_shape == (self.parts * shape[0], *shape[1:])

    def take(self, source: Tensor) -> Tensor:
        """The rows [n, ...] of the source [parts · n, ...]."""
        return source.chunk(self.parts)[self.part]


# Parts of the names of parameters that come and go with the settings.
optional_parameters: tuple[str, ...] = (
    ".query_mask.",
    ".gather_bias.",
    ".spread_bias.",
    ".self_attention.local.",
    ".from_sparse.",
    ".from_dense.",
)

# Parts of the names of parameters that are taken from others where a trained model has none of their name.
derived_parameters: Mapping[str, DerivedParameter] = MappingProxyType(
    {".self_attention.value.": DerivedParameter(".self_attention.qkv.", 2, 3, "the last third of qkv's")}
)
