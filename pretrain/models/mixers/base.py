"""Interfaces of a token mixer, a block's exchange among image tokens, and of a method that brings token mixers.

Letters: B images, N tokens of a grid of (rows, columns), D width.

A *token mixer* is one block's part: it takes the tokens, lets them exchange information, and gives the update. A *method*
builds the mixers of a backbone, and holds all else that depends on it: its problems, its compute budget, its FLOPs (through
its mixers) and the parameters that come and go with it. `mixers/__init__.py` has the table of methods.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.compute_budget import ComputeBudget
from pretrain.models.embeddings import Rotary
from pretrain.models.grids import Grid

# ---- a block's part ----


@dataclass(frozen=True)
class TokenState:
    """The tokens between two blocks, their (rows, columns), and the last block's query mask.

    Attributes:
        dense: the state of all tokens, while the blocks work on a coarser grid; else None.
    """

    x_BND: Tensor
    grid: Grid
    mask_BN1: Tensor
    dense: TokenState | None = None


@dataclass(frozen=True)
class Modulation:
    """Normalises and modulates tokens: LN(x)·(1 + scale) + shift, with a LayerNorm that has no parameters of its own."""

    shift_B1D: Tensor
    scale_B1D: Tensor
    eps: float = 1e-6

    def apply(self, x_BND: Tensor) -> Tensor:
        """The modulated tokens [B, N, D]."""
        return torch.addcmul(self.shift_B1D, F.layer_norm(x_BND, x_BND.shape[-1:], eps=self.eps), 1 + self.scale_B1D)


@dataclass(frozen=True)
class CoarseGrid:
    """A coarser grid over the same picture, and the rotary positions of its cells' centres."""

    grid: Grid
    rotary: Rotary


@dataclass(frozen=True)
class Positions:
    """The rotary positions of one forward pass: of all tokens, and of each method's coarser grid by the method's name."""

    tokens: Rotary
    coarse: Mapping[str, CoarseGrid]


class TokenMixer(ABC):
    """One block's exchange among image tokens.

    Attributes:
        attention: the module with its parameters; the block has it as `self_attention`.
        extra: further modules, which the block has under these names, after all its own.
    """

    attention: nn.Module
    extra: Mapping[str, nn.Module]

    def __init__(self) -> None:
        self.extra = {}

    @abstractmethod
    def mix(self, state: TokenState, modulation: Modulation, positions: Positions) -> tuple[TokenState, Tensor]:
        """The state that the block goes on with, and the update [B, N, D] of its tokens (or [B, 1, D], the same for all)."""

    def initialise(self) -> None:
        """Sets the parameters of `extra` to their start."""
        return

    def grid(self, tokens: Grid, budget: ComputeBudget) -> Grid:
        """The grid on which the block leaves its tokens, of a picture of `tokens`."""
        return tokens

    @abstractmethod
    def macs(self, tokens: Grid, budget: ComputeBudget) -> int:
        """Multiply-adds of one image, projections included."""

    @abstractmethod
    def kept_vectors(self, tokens: Grid, budget: ComputeBudget) -> int:
        """Vectors of width D that a training step keeps of one image for the backward pass, with the tokens and their norm."""


# ---- a method ----


@dataclass(frozen=True)
class TrainingChoice:
    """A method's choice for one training step.

    Attributes:
        times: the quantiles (low, high) of the objective's times to which the choice restricts the step's images.
    """

    choice: int
    times: tuple[float, float] = (0.0, 1.0)


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
        """True where a parameter of this shape can be taken from one of that shape; from None it cannot."""
        return source_shape == (self.parts * shape[0], *shape[1:])

    def take(self, source: Tensor) -> Tensor:
        """The rows [n, ...] of the source [parts · n, ...]."""
        return source.chunk(self.parts)[self.part]


class Method(ABC):
    """A way for image tokens to exchange information, bound to a backbone's shape and its own settings.

    Args:
        section: the value of the `DiTConfig` field that `section_name` names; None without one.

    Attributes:
        name: its name in `DiTConfig.attention` or `DiTConfig.density`, and in a `ComputeBudget`.
        optional_parameters: parts of the names of parameters that come and go with it.
        derived_parameters: by a part of their names, the parameters that a trained model without them can give.
    """

    name: ClassVar[str]
    section_name: ClassVar[str | None] = None
    optional_parameters: ClassVar[tuple[str, ...]] = ()
    derived_parameters: ClassVar[Mapping[str, DerivedParameter]] = {}

    def __init__(self, width: int, heads: int, depth: int, section: Any = None):
        self.width, self.heads, self.depth, self.section = width, heads, depth, section

    def problems(self) -> list[str]:
        """Reasons why the backbone cannot be built, each as `field: problem and mend`."""
        return []

    def grid_problems(self, tokens: Grid) -> list[str]:
        """Reasons why a backbone without problems cannot compute on a grid of tokens."""
        return []

    # The compute budget, for methods that leave a choice open.

    @property
    def choices(self) -> tuple[int, ...]:
        """The choices; none where nothing is left open."""
        return ()

    def default_choice(self, t: float) -> int:
        """The choice at noise level t in 0..1."""
        raise NotImplementedError

    def training_choice(self, cdf: Callable[[float], float], seed: int, step: int) -> TrainingChoice:
        """The choice of training step `step` (from 0) of the run with this seed; `cdf` is that of the objective's times."""
        raise NotImplementedError

    def coarse_grid(self, tokens: Grid, choice: int) -> Grid:
        """The coarser grid that its mixers need for a choice."""
        raise NotImplementedError


class Attention(Method):
    """A method of the blocks that hold all tokens."""

    @abstractmethod
    def mixer(self) -> TokenMixer:
        """A new mixer for one block."""


class Density(Method):
    """A method that decides on how many tokens each block computes."""

    @abstractmethod
    def mixers(self, dense: Callable[[], TokenMixer]) -> list[TokenMixer]:
        """New mixers for all blocks, from bottom to top; `dense` makes those of the blocks that hold all tokens."""


def hash64(words: str) -> int:
    """64 bits that follow from a text: for choices on which all processes agree without asking."""
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big")
