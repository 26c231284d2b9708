"""Steps of small engines on several processes, with what they exchange; run in processes of their own by `fork`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engines import Tiny, admit, engine_of, loss_of, tiny
from torch import Tensor

from pretrain.distributed.engine import GradientCheck
from pretrain.distributed.gradients import GradientReducer
from pretrain.distributed.rendezvous import init_distributed, shutdown

STEPS, MICRO_BATCHES, CLIPPING = 2, 3, 0.05
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter_tensor", "batch_isend_irecv")


class Branch(Tiny):
    """Its table is used by process 0 alone, as by a batch that has what no other has."""

    def forward(self, x_B3: Tensor) -> Tensor:
        table = self.table.sum() if int(os.environ["RANK"]) == 0 else 0
        return self.last(self.first(x_B3).tanh()) + table


def branch() -> Branch:
    model = Branch()
    model.load_state_dict(tiny().state_dict())
    return model


def micro_batch(step: int, micro: int, rank: int) -> Tensor:
    """Inputs [4, 3] whose size, and that of their gradients, differs a hundredfold between processes and micro-batches."""
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randn(4, 3, generator=generator) * 10 ** ((micro + rank) % 3 - 2)


def take_steps(out: Path) -> int:
    """Takes two steps of three micro-batches each, with several settings, and saves gradients, masters and reductions."""
    torch.set_num_threads(1)
    world = init_distributed()
    events: list[str] = []
    for name in REDUCTIONS:
        setattr(dist, name, _noted(getattr(dist, name), name, events))
    GradientReducer.finish = _noted(GradientReducer.finish, "finish", events)  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    for name, model, precision, overlap in (
        ("fp32", tiny(), False, True),
        ("bf16", tiny(), True, True),
        ("bf16 in the end", tiny(), True, False),
        ("branch", branch(), False, True),
    ):
        zero = {"stage": 2, "overlap_comm": overlap, "reduce_bucket_size": 16}
        engine = engine_of(
            world, model, MICRO_BATCHES, bf16={"enabled": precision}, gradient_clipping=CLIPPING, zero_optimization=zero
        )
        seen: dict[str, Any] = {"gradients": [], "events": []}

        def check(squared_norm: Tensor, engine: Any = engine, seen: Any = seen) -> GradientCheck:
            seen["events"].append(list(events))
            averaged = engine._engine.optimizer.averaged_gradients
            seen["gradients"].append([averaged[group][0].clone() for group in range(len(engine.masters))])
            squares = squared_norm.clone()
            dist.all_reduce(squares)
            return admit(squares)

        for step in range(STEPS):
            events.clear()
            for micro in range(MICRO_BATCHES):
                x = micro_batch(step, micro, world.rank).to(engine.dtype)
                engine.backward(loss_of(engine.forward(x)))
                engine.step(0.01, check)
        found[name] = seen | {"masters": [m.detach() for m in engine.masters], "slots": engine.layout}
    torch.save(found, out / f"{world.rank}.pt")
    shutdown()
    return 0


def _noted(function: Any, name: str, events: list[str]) -> Any:
    """The function, which adds its name, and its tensor's dtype, to the events."""

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        events.append(f"{name} {tensors[0].dtype}" if tensors else name)
        return function(*args, **kwargs)

    return call
