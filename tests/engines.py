"""Helpers of unit tests: a process group of this process alone, and small DeepSpeed engines in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from support import free_port
from torch import Tensor, nn

from pretrain.distributed.engine import Engine, GradientCheck
from pretrain.distributed.rendezvous import init_distributed, shutdown
from pretrain.distributed.world import World


@contextmanager
def one_process() -> Iterator[World]:
    """A group of this process alone, over gloo; afterwards the environment is as it was."""
    before = dict(os.environ)
    os.environ["MASTER_PORT"] = str(free_port())
    try:
        yield init_distributed()
    finally:
        shutdown()
        os.environ.clear()
        os.environ.update(before)


class Tiny(nn.Module):
    """Two linear maps and a table; 3 · 5 + 5 + 5 · 2 + 2 + 7 elements, so that two processes need padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)
        self.table = nn.Parameter(torch.randn(7))

    def forward(self, x_B3: Tensor) -> Tensor:
        return self.last(self.first(x_B3).tanh()) + self.table.sum()


def tiny(seed: int = 0) -> Tiny:
    """The same model for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW over two groups: the weights of linear maps decay, the rest does not."""
    matrices = [p for n, p in model.named_parameters() if n.endswith("weight")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("weight")]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))


def engine_of(
    world: World,
    model: nn.Module | None = None,
    micro_batches: int = 1,
    reused: Iterable[nn.Parameter] = (),
    **config: Any,
) -> Engine:
    """An engine over a tiny model, in fp32 and without clipping unless `config` says otherwise."""
    model = model or tiny()
    deepspeed: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2},
    }
    return Engine(model, adamw(model), deepspeed | config, world, reused)


def admit(squared_norm: Tensor) -> GradientCheck:
    """Applies every step."""
    return GradientCheck(squared_norm.sqrt().float(), admitted=True)


def refuse(squared_norm: Tensor) -> GradientCheck:
    """Applies no step."""
    return GradientCheck(squared_norm.sqrt().float(), admitted=False)


def inputs(step: int) -> Tensor:
    """A micro-batch [4, 3] of a step."""
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


def loss_of(prediction_B2: Tensor) -> Tensor:
    """A loss whose gradient depends on the weights."""
    return (prediction_B2.float() - 1).square().mean()


def train_steps(engine: Engine, steps: range, lr: float = 0.01) -> None:
    """Optimizer steps of one micro-batch each, all applied."""
    for step in steps:
        engine.backward(loss_of(engine.forward(inputs(step).to(engine.dtype))))
        engine.step(lr, admit)
