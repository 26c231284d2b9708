"""SPRINT's fusion (arXiv 2510.21986): what the first blocks know of all tokens joins what the deep ones know of a few.

    s    the tokens before block `first`
    u    what blocks first … last − 1 added to them; while training, where token routing left a token out, a learned vector
    x    = W_s · s + W_u · u + b,   with which block `last` goes on

As in SPRINT the projection is trained with the backbone and computed in sampling, too. Ours: it is given what the deep blocks
added, in place of their output, and starts with W_s = W_u = I and zeros. So a fresh fusion changes nothing: without routing the
model is the plain one, with routing it is TREAD. The learned vector is added after W_u: a few products fewer for the same sum.

Letters: B images, N tokens of an image, n those that the deep blocks compute, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from pretrain.models.mixers.base import TokenState
from pretrain.models.routing import Route

PREFIX = "fusion."  # of the names of its parameters in a backbone


class Fusion(nn.Module):
    """The tokens before block `first` and those after block `last` − 1 to those of block `last`."""

    def __init__(self, width: int, first: int, last: int):
        super().__init__()
        self.first, self.last = first, last
        self.before = nn.Linear(width, width)
        self.added = nn.Linear(width, width, bias=False)
        self.left_out = nn.Parameter(torch.empty(width))

    def initialise(self) -> None:
        """Both maps the identity, the rest 0: a fresh fusion changes nothing."""
        nn.init.eye_(self.before.weight)
        nn.init.eye_(self.added.weight)
        nn.init.zeros_(self.left_out)

    def forward(self, before: TokenState, after: TokenState, route: Route | None) -> TokenState:
        """The state of all tokens; with a route `after` is that of the kept ones."""
        x_BND = before.x_BND
        kept_BnD = x_BND if route is None else route.take(x_BND)
        added = self.added(after.x_BND - kept_BnD)
        if route is not None:
            after = route.come_back(after, before)
            added = route.put_back(added, self.left_out.to(x_BND.dtype).expand_as(x_BND))
        return replace(after, x_BND=self.before(x_BND) + added)


def macs(width: int, tokens: int, kept: int) -> int:
    """Multiply-adds of one image, of whose tokens the deep blocks compute `kept`."""
    return (tokens + kept) * width**2
