"""Muon for the matrices inside the blocks, AdamW for all other parameters, under ZeRO-2.

Muon (Keller Jordan, 2024; at scale: arXiv 2502.16982) replaces a matrix's momentum by the nearest orthogonal matrix:

    M ← β·M + (1 − β)·G,    O = orthogonalise(β·M + (1 − β)·G),    W ← (1 − lr·decay)·W − lr · 0.2·√max(rows, columns) · O

The last factor gives O the root mean square that AdamW's updates have, so one learning rate serves all parameters.

O needs whole matrices, while ZeRO-2's partitions are cut anywhere. A matrix that is cut goes to the process that holds most of
it, is orthogonalised there, and goes back, in the buffer in which the gradients were summed: no further memory, and at most
one matrix for each end of a partition is sent. DeepSpeed's own Muon works inside its reduction of gradients, which
`gradients.py` replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.distributed.partition import Slot
from pretrain.distributed.world import World, exchange

NS_STEPS = 5
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_EPS = 1e-7
RMS_OF_ADAMW = 0.2


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `muon: True` take Muon's step.

    A group of Muon's keeps one moment, `exp_avg`. Its parameter is ZeRO-2's flat partition; `place` says what lies in it.

    Args:
        groups: of parameters, each with its `weight_decay`, and `muon` where its parameters are matrices.
        momentum: β.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float, **adamw: Any):
        super().__init__(groups, **adamw)
        self.momentum = momentum
        self._matrices: dict[int, PartitionedMatrices] = {}

    def place(self, slots: Sequence[Slot], buffers: Sequence[Tensor], world: World) -> None:
        """Takes the parameters' places in the groups' flat buffers, and a buffer [whole group] for each group to compute in."""
        for index, group in enumerate(self.param_groups):
            if group.get("muon"):
                inside = [slot for slot in slots if slot.group == index]
                self._matrices[id(group)] = PartitionedMatrices(inside, buffers[index], world)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates all groups. ZeRO-2 calls it for one group at a time."""
        groups = self.param_groups
        for group in groups:
            if group.get("muon"):
                self._muon_step(group)
        self.param_groups = [group for group in groups if not group.get("muon")]
        super().step()
        self.param_groups = groups

    def _muon_step(self, group: dict[str, Any]) -> None:
        (master,) = group["params"]
        matrices, state, beta = self._matrices[id(group)], self.state[master], self.momentum
        if not state:
            state |= initial_state(master)
        state["step"] += 1
        state["exp_avg"].lerp_(master.grad, 1 - beta)
        update = matrices.partition
        torch.lerp(master.grad, state["exp_avg"], beta, out=update)  # may be the gradient's own memory
        matrices.apply(rms_matched_orthogonal)
        master.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def initial_state(master: Tensor) -> dict[str, Tensor]:
    """Muon's state of a partition before the first step."""
    return {"step": torch.zeros(()), "exp_avg": torch.zeros_like(master, requires_grad=False)}


class PartitionedMatrices:
    """Matrices end to end in a flat buffer of which each process holds a partition.

    Attributes:
        partition: this process's part [n] of the buffer.
    """

    def __init__(self, slots: Sequence[Slot], buffer: Tensor, world: World):
        """
        Args:
            slots: the matrices' places.
            buffer: [world.size · n]; the partitions of the other processes are free to be written to.
        """
        self._world = world
        self.partition = buffer.chunk(world.size)[world.rank]
        size, self._own, self._parts = len(self.partition), [], []
        for slot in slots:
            parts = [(rank, overlap) for rank in slot.ranks(size) if (overlap := slot.overlap(rank, size))]
            owner = max(parts, key=lambda part: part[1].in_parameter.stop - part[1].in_parameter.start)[0]
            flat = buffer[slot.offset : slot.offset + slot.numel]
            self._parts += [(flat[overlap.in_parameter], rank, owner) for rank, overlap in parts if rank != owner]
            if owner == world.rank:
                self._own.append(flat.view(slot.shape))

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes each whole matrix in place, in one process; all processes call it together."""
        exchange(self._parts, self._world)
        for matrix in self._own:
            matrix.copy_(change(matrix))
        exchange([(part, owner, rank) for part, rank, owner in self._parts], self._world)


def rms_matched_orthogonal(matrix: Tensor) -> Tensor:
    """The matrix orthogonalised, with about the root mean square of AdamW's updates (arXiv 2502.16982, §2.2)."""
    # CPUs without bf16 instructions take several times as long for bf16 products as for fp32 ones.
    dtype = torch.bfloat16 if matrix.is_cuda else torch.float32
    return RMS_OF_ADAMW * max(matrix.shape) ** 0.5 * orthogonalise(matrix, dtype).to(matrix.dtype)


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest orthogonal matrix, about: five Newton–Schulz iterations in `dtype`; singular values end in 0.7..1.2."""
    a, b, c = NS_COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=NS_EPS)
    for _ in range(NS_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
