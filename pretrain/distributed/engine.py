"""DeepSpeed ZeRO-2: backward, step, and each process's partition of the parameters.

Each process keeps one partition of each optimizer group (`partition.py`): its fp32 master, AdamW's moments and (in `ema.py`)
the average. DeepSpeed's inner state is reached through `deepspeed_private.py`.

Precision: with `bf16.enabled` the forward and backward pass run on bf16 weights, which are a rounded copy of fp32 masters. So
no update is lost to rounding, as it is where bf16 weights are all there is (PRX measured FID 21.9 for those against 18.2 with
fp32 weights under autocast); autocast over fp32 weights would cost another 2 bytes a parameter and a cast of each weight in
each micro-batch. The backward pass makes bf16 gradients then; they are added up over the micro-batches and reduced over the
processes in fp32 (`gradients.py`), and over the blocks where several share a parameter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from pretrain.distributed import torch_private
from pretrain.distributed.deepspeed_private import Zero
from pretrain.distributed.gradients import GradientReducer
from pretrain.distributed.muon import Muon, initial_state
from pretrain.distributed.partition import Slot
from pretrain.distributed.world import World, all_gather_into

# The throughput timer, which is on by default, waits for the device twice in each micro-batch.
FIXED = {
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 2**31,
    "timers": {"throughput": {"enabled": False}},
}


@dataclass(frozen=True)
class GradientCheck:
    """The gradient of a step: its norm over all processes (a scalar), and whether the update may be applied."""

    norm: Tensor
    admitted: bool


class Engine:
    """A model under ZeRO-2.

    Attributes:
        deepspeed: DeepSpeed's config.
        module: the model; its weights are the rounded masters.
        masters: this process's fp32 partition [n] of each optimizer group.
        slots: the place of every parameter; the same for every number of processes.
        gradients: this process's parts of the step's mean gradient in fp32, one for each parameter of which it keeps a part;
            complete when `step` calls its check.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        world: World,
        reused: Iterable[nn.Parameter] = (),
    ):
        """
        Args:
            config: DeepSpeed's.
            reused: parameters that a forward pass uses several times; their gradients of each use are added up in fp32, too.
        """
        self.world, self.deepspeed = world, config
        names = {id(p): n for n, p in model.named_parameters()}
        # DeepSpeed makes the masters from weights already rounded to bf16; the exact ones are put back below.
        exact = {n: p.detach().to("cpu", torch.float32, copy=True) for n, p in model.named_parameters()}
        config = {**config, **FIXED}
        # DeepSpeed takes the GPU numbered LOCAL_RANK, also where each process sees its own one only.
        args = SimpleNamespace(device_rank=world.device.index) if world.device.type == "cuda" else None
        self._engine, *_ = deepspeed.initialize(
            args=args, model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self._zero = Zero(self._engine)
        self._zero.set_timeout(world.timeout)
        self._zero.replace_overflow_check(self._check_gradients, lambda: self._norm)
        self.module: nn.Module = self._engine.module
        self.dtype = next(self.module.parameters()).dtype
        self.masters = self._zero.masters
        slots = {p: slot for group in range(len(self.masters)) for p, slot in self._slots_of(group, names).items()}
        self.slots = list(slots.values())
        buffers = self._replace_reduction({p: slots[p] for p in names if p in slots})
        if isinstance(optimizer, Muon):
            optimizer.place(self.slots, buffers, world)
        for parameter in reused:
            parameter.grad_dtype = torch.float32  # by default autograd adds them up in the weights' precision
        for master in self.masters:
            master.detach().zero_()  # the padding stays 0
        self.load_partitions(self.masters, exact.__getitem__)
        self.all_gather_weights(self.masters)

    def _slots_of(self, group: int, names: dict[int, str]) -> dict[int, Slot]:
        flat = self._zero.flat_weights(group)
        return {
            id(p): Slot(names[id(p)], tuple(p.shape), group, (p.data_ptr() - flat.data_ptr()) // flat.element_size())
            for p in self._zero.parameters(group)
        }

    def _replace_reduction(self, slots: dict[int, Slot]) -> list[Tensor]:
        """Reduces in fp32 from now on; returns the buffers in which each group's gradients are summed."""
        sizes = [self._zero.flat_weights(group).numel() for group in range(len(self.masters))]
        zero, world = self._zero, self.world
        reducer = GradientReducer(slots, sizes, zero.bucket_size, zero.overlaps, world)
        zero.replace_reduction(reducer.add, reducer.finish, reducer.partitions)
        overlaps = [(s, s.overlap(world.rank, len(reducer.partitions[s.group]))) for s in slots.values()]
        # A parameter's part each: one norm over a partition of 10⁹ elements would be summed up in fp32.
        self.gradients = [reducer.partitions[s.group][o.in_partition] for s, o in overlaps if o is not None]
        return reducer.sums

    # ---- a step ----

    def forward(self, *inputs: Any) -> Any:
        """The module's prediction, seen by DeepSpeed."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch; the mean over micro-batches is taken here."""
        self._engine.backward(loss)

    def step(self, lr: float, check: Callable[[Tensor], GradientCheck]) -> None:
        """Ends a micro-batch. At an accumulation boundary: reduces, clips, and updates with this learning rate.

        Args:
            check: is given this process's part of the gradient's squared norm (an fp64 scalar) and decides about the step;
                where it does not admit it, nothing is updated. It must decide alike on all processes.
        """
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._check = check
        self._engine.step()

    def _check_gradients(self) -> bool:
        checked = self._check(squared_norm(self.gradients, self.masters[0].device))
        self._norm = checked.norm
        return checked.admitted

    @property
    def applied(self) -> bool:
        """True where the last step updated the parameters."""
        return self._zero.step_applied

    # ---- this process's partitions ----

    def moments(self) -> dict[str, list[Tensor]]:
        """The moments `exp_avg` and `exp_avg_sq` [n] of each master, zeros before the first step; Muon has no second one: [0]."""
        state = self._zero.state
        for master, group in zip(self.masters, self._zero.param_groups, strict=True):
            if not state[master]:
                state[master] = initial_state(master)
                if not group.get("muon"):
                    state[master]["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)
                    if group.get("fused"):
                        state[master]["step"] = state[master]["step"].to(master.device)
        return {k: [state[m].get(k, m.new_empty(0)) for m in self.masters] for k in ("exp_avg", "exp_avg_sq")}

    def adamw_update_norm(self, group: int, part: slice) -> Tensor:
        """The norm of AdamW's last update of a part of this process's partition, divided by lr, without weight decay: [], fp32.

        0 for Muon's matrices.
        """
        settings, state = self._zero.param_groups[group], self._zero.state[self.masters[group]]
        if settings.get("muon") or not state:
            return torch.zeros((), device=self.world.device)
        (beta1, beta2), steps = settings["betas"], state["step"]
        mean = state["exp_avg"][part] / (1 - beta1**steps)
        deviation = (state["exp_avg_sq"][part] / (1 - beta2**steps)).sqrt_()
        return torch.linalg.vector_norm(mean / deviation.add_(settings["eps"]))

    @property
    def updates(self) -> int:
        """The optimizer's own count of updates, by which AdamW corrects its moments' bias."""
        self.moments()
        return int(self._zero.state[self.masters[0]]["step"].item())

    @updates.setter
    def updates(self, count: int) -> None:
        self.moments()
        for master in self.masters:
            self._zero.state[master]["step"].fill_(count)

    @torch.no_grad()
    def load_partitions(self, partitions: list[Tensor], read: Callable[[str], Tensor | None]) -> None:
        """Copies this process's parts of whole parameters into its partitions.

        Args:
            partitions: a tensor [n] for each optimizer group: the masters, a moment of theirs, or their average.
            read: gives a parameter's values by its name, of the parameter's shape; None leaves them as they are.
        """
        for slot in self.slots:
            partition = partitions[slot.group]
            overlap = slot.overlap(self.world.rank, partition.numel())
            if overlap is not None and (whole := read(slot.name)) is not None:
                partition[overlap.in_partition] = whole.reshape(-1)[overlap.in_parameter].to(partition)

    @torch.no_grad()
    def all_gather_weights(self, partitions: list[Tensor]) -> None:
        """Makes all processes' partitions, rounded, the module's weights on all processes; the masters stay as they are."""
        for group, partition in enumerate(partitions):
            own = self._zero.flat_partition(group, self.world.rank)
            own.data.copy_(partition)
            all_gather_into(self._zero.flat_weights(group).data, own.data.clone(), self.world)

    @property
    def layout(self) -> list[dict[str, Any]]:
        """The slots as a checkpoint keeps them."""
        return [asdict(s) for s in self.slots]

    @property
    def layout_hash(self) -> str:
        """The SHA-256 of the parameters' names, shapes and groups in order."""
        return hashlib.sha256(json.dumps([[s.name, s.shape, s.group] for s in self.slots]).encode()).hexdigest()


def squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Sums the squares of all elements of these tensors into an fp64 scalar; 0 where there are none."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch_private.norms(gradients).double().square().sum()
