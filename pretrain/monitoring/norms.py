"""Norms of the parameters, and of AdamW's last update of them, by part of the backbone.

Each process sums the squares of its partitions of ZeRO-2; nothing is copied and the device is not waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.distributed import torch_private
from pretrain.distributed.engine import Engine

PARTS = ("embeddings", "modulation", "attention", "ffn", "shared_expert", "query_mask", "final", "alignment")


def part_of(name: str) -> str:
    """The part of PARTS that a parameter of `DiT` belongs to, by its name; token mixers' own belong to attention."""
    names = name.split(".")
    inside = names[2] if names[0] == "blocks" else names[0]
    if inside in ("ffn", "shared_expert", "query_mask", "final", "alignment"):
        return inside
    if inside in ("scale_shift_table", "time_modulation"):
        return "modulation"
    return "attention" if names[0] == "blocks" else "embeddings"


class PartNorms:
    """Sums of squares by part, P parts."""

    def __init__(self, engine: Engine):
        self.engine = engine
        held = [(s, s.overlap(engine.world.rank, engine.masters[s.group].numel())) for s in engine.slots]
        self._places = [(s.group, o.in_partition) for s, o in held if o is not None]
        parts = [PARTS.index(part_of(s.name)) for s, o in held if o is not None]
        self._parts = torch.tensor(parts, dtype=torch.long, device=engine.world.device)

    @torch.no_grad()
    def squares_2P(self) -> Tensor:
        """Sums over this process's partitions [2, P], fp32: squares of the parameters, and of their last update divided by lr.

        Muon's matrices and weight decay are not counted in the second. It means nothing where no step was applied yet.
        """
        engine = self.engine
        sums = torch.zeros(2, len(PARTS), device=engine.world.device)
        if self._places:
            own = torch_private.norms([engine.masters[group].detach()[at] for group, at in self._places])
            updates = torch.stack([engine.adamw_update_norm(group, at) for group, at in self._places])
            sums.index_add_(1, self._parts, torch.stack([own, updates]).square())
        return sums
