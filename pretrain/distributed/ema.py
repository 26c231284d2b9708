"""The weights' exponential moving average in fp32, 1/N of it on each of N processes.

It follows ZeRO-2's own slices of the masters, so that no process holds a full copy: averaged = decay · averaged + (1 − decay) ·
master after each applied step. In bf16 a decay of 0.9999 would hardly move it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pretrain.distributed.engine import Engine


class Ema:
    """The average of an engine's masters; `shares` are this process's slices."""

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        self.shares: list[Tensor] = [m.detach().clone() for m in engine.masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimizer step number `step`, counted from 0; young averages forget faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shares, [m.detach() for m in self.engine.masters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the module's weights are the average, on all processes; then the masters again, exactly."""
        self.engine.publish(self.shares)
        try:
            yield
        finally:
            self.engine.publish(self.engine.masters)
