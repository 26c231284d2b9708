"""The weights' exponential moving averages in fp32, 1/N of each on each of N processes.

It follows ZeRO-2's own partitions of the masters, so that no process holds a full copy: average = decay · average +
(1 − decay) · master after each applied step. In bf16 a decay of 0.9999 would hardly move it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pretrain.config import OptimizerSection
from pretrain.distributed import torch_private
from pretrain.distributed.engine import Engine


class Ema:
    """The averages of an engine's masters.

    Attributes:
        decays: by the average's name. Samples, previews and exports use the one that is named `ema`.
        partitions: this process's part of each average, one tensor [n] an optimizer group.
    """

    def __init__(self, engine: Engine, optimizer: OptimizerSection):
        self.engine, self.decays = engine, optimizer.averages()
        self.partitions: dict[str, list[Tensor]] = {
            name: [m.detach().clone() for m in engine.masters] for name in self.decays
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the masters after update number `step`, counted from 0, with a decay of at most (1 + step) / (10 + step)."""
        masters = [m.detach() for m in self.engine.masters]
        for name, decay in self.decays.items():
            torch_private.lerp_(self.partitions[name], masters, 1 - min(decay, (1 + step) / (10 + step)))

    @contextmanager
    def applied(self, name: str = "ema") -> Iterator[None]:
        """Puts an average into the module's weights within it, on all processes; then the masters again, exactly."""
        self.engine.all_gather_weights(self.partitions[name])
        try:
            yield
        finally:
            self.engine.all_gather_weights(self.engine.masters)
