"""Norms by part against plain sums over whole parameters before and after a step, over one to three processes' partitions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbones import build
from torch import Tensor

from pretrain.distributed.engine import Engine
from pretrain.distributed.partition import Slot
from pretrain.distributed.world import World
from pretrain.models import PRESETS, DiT, preset
from pretrain.monitoring.norms import PARTS, PartNorms, part_of

LR = 1e-2


def flat(parameters: list[Tensor], size: int) -> Tensor:
    whole = torch.cat([p.detach().flatten() for p in parameters])
    return torch.cat([whole, whole.new_zeros(size - len(whole))])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_norms_equal_those_of_whole_parameters(processes: int) -> None:
    """torch's own AdamW takes three steps; the last one's change is its update."""
    torch.manual_seed(0)
    model = build(preset("focusdit_tiny"))
    names, parameters = zip(*model.named_parameters(), strict=True)
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    offsets = [sum(p.numel() for p in parameters[:i]) for i in range(len(parameters))]
    slots = [Slot(n, tuple(p.shape), 0, o) for n, p, o in zip(names, parameters, offsets, strict=True)]
    size = -(-sum(p.numel() for p in parameters) // processes)
    state = [optimizer.state[p] for p in parameters]
    whole = {key: flat([s[key] for s in state], size * processes) for key in ("exp_avg", "exp_avg_sq")}
    masters = flat(list(parameters), size * processes)
    sums = torch.zeros(2, len(PARTS))
    for rank in range(processes):
        own = slice(rank * size, (rank + 1) * size)
        master = masters[own]
        kept = {master: {"step": torch.tensor(3.0)} | {key: value[own] for key, value in whole.items()}}
        zero = SimpleNamespace(param_groups=[{"betas": (0.9, 0.95), "eps": 1e-8}], state=kept)
        world = World(rank, processes, torch.device("cpu"))
        engine: Any = SimpleNamespace(world=world, masters=[master], slots=slots, _zero=zero)
        engine.adamw_update_norm = lambda group, part, e=engine: Engine.adamw_update_norm(e, group, part)
        sums += PartNorms(engine).squares_2P()
    for index, part in enumerate(PARTS):
        mine = [i for i, name in enumerate(names) if part_of(name) == part]
        norm = sum(parameters[i].detach().double().square().sum().item() for i in mine) ** 0.5
        moved = sum((parameters[i] - before[i]).detach().double().square().sum().item() for i in mine) ** 0.5
        assert sums[0, index].sqrt().item() == pytest.approx(norm, rel=1e-5), part
        assert LR * sums[1, index].sqrt().item() == pytest.approx(moved, rel=1e-3), part


def test_parts_are_those_of_their_modules() -> None:
    for name in PRESETS:
        with torch.device("meta"):
            model = DiT(preset(name))
        found = {part: {n for n, _ in model.named_parameters() if part_of(n) == part} for part in PARTS}
        c = model.config
        assert bool(found["shared_expert"]) == (c.ffn == "shared")
        assert bool(found["query_mask"]) == (c.mask != "none")
        assert len(found["ffn"]) == 4 * c.depth
        tables = {n for n, _ in model.named_parameters() if "scale_shift_table" in n and n.startswith("blocks.")}
        assert found["modulation"] == tables | {"time_modulation.weight", "time_modulation.bias"}
        assert all(n.startswith(("patch_embed", "time_embed", "text_projection")) for n in found["embeddings"])
