"""The weights' exponential moving average in fp32, 1/N of it on each of N processes.

It follows ZeRO-2's own partitions of the masters, so that no process holds a full copy: average = decay · average +
(1 − decay) · master after each applied step. In bf16 a decay of 0.9999 would hardly move it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pretrain.distributed import torch_private
from pretrain.distributed.engine import Engine


class Ema:
    """The average of an engine's masters; `partitions` are this process's part of it, one tensor [n] an optimizer group."""

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        self.partitions: list[Tensor] = [m.detach().clone() for m in engine.masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the masters after update number `step`, counted from 0, with a decay of at most (1 + step) / (10 + step)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch_private.lerp_(self.partitions, [m.detach() for m in self.engine.masters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the average into the module's weights within it, on all processes; then the masters again, exactly."""
        self.engine.all_gather_weights(self.partitions)
        try:
            yield
        finally:
            self.engine.all_gather_weights(self.engine.masters)
