"""Token routing while training: some blocks compute a random part of each image's tokens alone, so that a step costs less.

TREAD (arXiv 2501.04765) leaves tokens out before block `first`; before block `last` they come back with the state that they had.
SPRINT (arXiv 2510.21986) does, too, and joins both paths by a projection of the backbone (`fusion.py`). Deferred masking
(micro_diffusion, arXiv 2407.15811) leaves them out to the end: the first blocks mix all tokens, so that those that stay know of
the others, and the loss is of the patches that stay. Either way a last phase of the training computes all tokens, as sampling
does.

Ours: the blocks are the backbone's own. micro_diffusion's small patch mixer in front of the backbone would be further
parameters; its part is that of blocks 0 … first − 1.

Letters: B images, K blocks, N tokens of an image, n those that are kept, H W height and width of the latent, X any width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import repeat
from torch import Tensor

from pretrain.models.config import DiTConfig
from pretrain.models.grids import Grid
from pretrain.models.mixers.base import Positions, TokenState


@dataclass(frozen=True)
class Routing:
    """A run's routing.

    Attributes:
        name: tread | sprint | deferred_masking.
        share: of an image's tokens that are left out, in [0, 1).
        first, last: blocks first … last − 1 compute the kept tokens alone; for deferred masking `last` is the depth, for sprint
            both are those of the backbone's fusion.
        until: share of the run's steps, from its start, that are routed.
    """

    name: str
    share: float
    first: int
    last: int
    until: float

    def problems(self, backbone: DiTConfig) -> list[str]:
        """Reasons why a backbone without problems cannot be trained so, each as `field: problem and mend`."""
        if self.name == "sprint" and backbone.fusion is None:
            usual = "model.fusion=[{},{}]".format(*backbone.usual_fusion)
            return [f"name: sprint needs the projection that joins both paths; add it to the model by {usual}"]
        found = []
        if self.name != "sprint" and backbone.fusion is not None:
            found.append(
                f"name: a model with model.fusion goes with sprint or none, not {self.name}; leave one of them out"
            )
        if not 0 <= self.first < self.last <= backbone.depth:
            found.append(
                f"first: {self.first} (and last: {self.last}) must be blocks with 0 ≤ first < last ≤ {backbone.depth}, "
                "the model's depth"
            )
        for field, alone in (("attention", "full"), ("density", "dense")):
            if (chosen := getattr(backbone, field)) != alone:
                found.append(
                    f"name: {self.name} does not go with model.{field}={chosen}, whose cells are means over the whole grid of "
                    f"tokens; take model.{field}={alone}, or routing.name=none"
                )
        return found

    def steps(self, steps: int) -> int:
        """The number of routed steps of a run of `steps`: its first ones; none where no token is left out."""
        return round(self.until * steps) if self.share else 0

    def kept(self, tokens: int) -> int:
        """How many of an image's tokens are kept: all but the share, rounded down; at least one."""
        return tokens - int(self.share * tokens)

    def tokens(self, block: int, tokens: int) -> int:
        """How many of an image's tokens a block computes."""
        return self.kept(tokens) if self.first <= block < self.last else tokens

    def route(self, kept_Bn: Tensor) -> Route:
        """The route of a batch, by the places of its kept tokens."""
        return Route(kept_Bn, self.first, self.last)

    def judged(self, route: Route, grid: Grid, patch: int) -> Tensor | None:
        """1 for the latent pixels [B, H, W] that the loss is of, 0 for the others; None where it is of all."""
        return route.pixels(grid, patch) if self.name == "deferred_masking" else None


@dataclass(frozen=True)
class Route:
    """A forward pass's routing: blocks `first` … `last` − 1 compute the kept tokens alone.

    Attributes:
        kept_Bn: the places of each image's kept tokens among its N, ascending.
    """

    kept_Bn: Tensor
    first: int
    last: int

    def take(self, x_BNX: Tensor) -> Tensor:
        """The kept tokens' values [B, n, X]."""
        return x_BNX.flatten(0, 1).index_select(0, self._rows(x_BNX.shape[1])).unflatten(0, self.kept_Bn.shape)

    def put_back(self, kept_BnX: Tensor, x_BNX: Tensor) -> Tensor:
        """The values [B, N, X] with new ones for the kept tokens."""
        rows = self._rows(x_BNX.shape[1])
        return x_BNX.flatten(0, 1).index_copy(0, rows, kept_BnX.flatten(0, 1)).view_as(x_BNX)

    def leave(self, state: TokenState) -> TokenState:
        """The state of the kept tokens; its grid stays that of the picture."""
        return replace(state, x_BND=self.take(state.x_BND), mask_BN1=self.take(state.mask_BN1))

    def come_back(self, kept: TokenState, before: TokenState) -> TokenState:
        """The state of all tokens: the left-out ones as they were before."""
        x_BND = self.put_back(kept.x_BND, before.x_BND)
        return replace(before, x_BND=x_BND, mask_BN1=self.put_back(kept.mask_BN1, before.mask_BN1))

    def positions(self, positions: Positions) -> Positions:
        """The kept tokens' rotary positions."""
        return replace(positions, tokens=positions.tokens.take(self.kept_Bn))

    def dropout(self, keep_KBN: Tensor | None) -> Tensor | None:
        """The kept tokens' dropout [K, B, n] of the query masks."""
        return None if keep_KBN is None else keep_KBN.gather(2, self.kept_Bn.expand(len(keep_KBN), -1, -1))

    def pixels(self, grid: Grid, patch: int) -> Tensor:
        """1 for the latent pixels [B, H, W] of kept tokens, 0 for the others, for a picture of (rows, columns) of tokens."""
        B, (rows, columns) = len(self.kept_Bn), grid
        kept_BN = torch.zeros(B, rows * columns, device=self.kept_Bn.device).scatter_(1, self.kept_Bn, 1.0)
        return repeat(kept_BN, "B (r c) -> B (r p) (c q)", r=rows, p=patch, q=patch)

    def _rows(self, tokens: int) -> Tensor:
        """The kept tokens' places among those of all images."""
        first_B1 = tokens * torch.arange(len(self.kept_Bn), device=self.kept_Bn.device)[:, None]
        return (first_B1 + self.kept_Bn).flatten()
