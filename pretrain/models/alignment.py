"""Alignment while training: a block's tokens, projected, are drawn towards a vision encoder's features of the clean picture.

REPA (arXiv 2410.06940): to the objective's loss comes

    − weight · mean over tokens of cos(MLP(tokens after block `block`), features)

with an MLP of three linear maps and SiLU between them. The features are made at data prep (`data_prep/features.py`), one vector
for 2 × 2 latent pixels; where a token is larger, it has their mean. The MLP belongs to the training alone: it is trained,
averaged and kept in checkpoints with the backbone, of which it is a submodule then, but no export and no sampler has it.
HASTE (arXiv 2505.16792) found that the alignment hinders later in training: `until` switches it off.

Letters: B images, N tokens of an image, n those that the block computes, D their width, F that of the features; h, w vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.models.budget_choices import every_budget
from pretrain.models.config import DiTConfig
from pretrain.models.grids import Grid
from pretrain.models.routing import Route, Routing

CELL = 2  # latent pixels of a vector of the features, along each side
NAME = "alignment"  # of the projection in a backbone
PREFIX = f"{NAME}."  # of the names of its parameters


@dataclass(frozen=True)
class Alignment:
    """A run's alignment.

    Attributes:
        weight: of the alignment in the loss, above 0.
        block: whose output is aligned, from 0.
        hidden: width of the projection's hidden layers.
        until: share of the run's steps, from its start, that are aligned.
    """

    weight: float
    block: int
    hidden: int
    until: float

    def problems(self, backbone: DiTConfig, grid: Grid) -> list[str]:
        """Reasons why a backbone without problems cannot be trained so on a grid of tokens, each as `field: problem and mend`."""
        if self.block >= backbone.depth:
            return [f"block: {self.block} must be below {backbone.depth}, the model's depth"]
        found = []
        if backbone.patch % CELL:
            found.append(
                f"weight: model.patch={backbone.patch} must be divisible by {CELL}, the latent pixels of a feature; take "
                f"model.patch={CELL}, or alignment.weight=0"
            )
        attention, density = backbone.methods
        with torch.device("meta"):
            mixer = density.mixers(attention.mixer)[self.block]
        if any(mixer.grid(grid, budget) != grid for budget in every_budget(backbone)):
            found.append(
                f"block: with model.density={backbone.density} block {self.block} has fewer tokens than the features; take a "
                "block that holds all tokens, or alignment.weight=0"
            )
        return found

    def steps(self, steps: int) -> int:
        """The number of aligned steps of a run of `steps`: its first ones."""
        return round(self.until * steps)

    def macs(self, width: int, features: int, tokens: int) -> int:
        """Multiply-adds of the projection for so many tokens."""
        return tokens * (width * self.hidden + self.hidden**2 + self.hidden * features)

    def tokens(self, tokens: int, routing: Routing | None) -> int:
        """How many of an image's tokens are aligned: those that the block computes."""
        return tokens if routing is None else routing.tokens(self.block, tokens)

    def loss(self, projected_BnF: Tensor, features_BhwF: Tensor, patch: int, route: Route | None) -> Tensor:
        """The mean negative cosine similarity, in fp32.

        Args:
            projected_BnF: the block's tokens, projected.
            features_BhwF: of the whole picture.
            patch: the backbone's.
            route: token routing of this pass.
        """
        features_BNF = pooled(features_BhwF, patch)
        if route is not None and route.first <= self.block < route.last:
            features_BNF = route.take(features_BNF)
        return -F.cosine_similarity(projected_BnF.float(), features_BNF, dim=-1).mean()


def pooled(features_BhwF: Tensor, patch: int) -> Tensor:
    """The mean of each token's vectors [B, N, F] in fp32, for tokens of patch × patch latent pixels."""
    p = patch // CELL
    cells = rearrange(features_BhwF.float(), "B (r p) (c q) F -> B (r c) (p q) F", p=p, q=p)
    return cells.mean(2)


class Projection(nn.Module):
    """REPA's projection of tokens [B, n, D] to the width of the features, [B, n, F].

    Attributes:
        block: whose output it projects.
    """

    def __init__(self, width: int, alignment: Alignment, features: int):
        super().__init__()
        self.block, hidden = alignment.block, alignment.hidden
        sizes = (width, hidden, hidden, features)
        first, second, last = (nn.Linear(one, next_) for one, next_ in pairwise(sizes))
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
        for layer in (first, second, last):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_BnD: Tensor) -> Tensor:
        return self.layers(x_BnD)
