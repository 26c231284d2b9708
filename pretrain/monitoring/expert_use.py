"""How much the shared FFN expert says beside each block's own: the share of both outputs' size that is the shared one's.

Sizes are root mean squares over all tokens that a model computes. Forward hooks measure them, so a training step pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.distributed.world import World, all_reduce
from pretrain.models import DiT

OWN, SHARED = 0, 1


class ExpertUse:
    """Sums of squares [2, K] of the experts' outputs in K blocks, own and shared."""

    def __init__(self, model: DiT):
        device = next(model.parameters()).device
        self.model, self.squares_2K = model, torch.zeros(2, len(model.blocks), dtype=torch.float64, device=device)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Adds what the model computes within it; nothing where it has no shared expert."""
        shared = self.model.shared_expert
        if shared is None:
            yield
            return
        now = 0  # the block that computes

        def enter(index: int) -> Callable[[nn.Module, Any], None]:
            def hook(block: nn.Module, inputs: Any) -> None:
                nonlocal now
                now = index

            return hook

        def add(expert: int) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(module: nn.Module, inputs: Any, output_BND: Tensor) -> None:
                self.squares_2K[expert, now] += output_BND.detach().double().square().sum()

            return hook

        blocks = [self.model.block(index) for index in range(len(self.model.blocks))]
        hooks = [block.register_forward_pre_hook(enter(index)) for index, block in enumerate(blocks)]
        hooks += [block.ffn.register_forward_hook(add(OWN)) for block in blocks if block.ffn is not None]
        hooks.append(shared.register_forward_hook(add(SHARED)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def scalars(self, world: World) -> dict[str, float]:
        """The shared expert's percent of each block with an output, over all processes, which all call it."""
        own_K, shared_K = all_reduce(self.squares_2K.clone(), world).sqrt().cpu()
        percent_K = 100 * shared_K / (own_K + shared_K)
        return {
            f"shared_expert_percent/block_{k:02d}": percent.item()
            for k, percent in enumerate(percent_K)
            if own_K[k] + shared_K[k] > 0
        }
