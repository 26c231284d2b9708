"""DeepSpeed ZeRO-2: backward, step, and each process's share of the parameters.

ZeRO-2 lays the parameters of each optimizer group end to end in one flat buffer, pads it to a multiple of the processes,
and gives each process one slice, of which it keeps the fp32 master, AdamW's moments and (in `ema.py`) the average.
Everything that this project reads of DeepSpeed's inner state is read here.

Precision: with `bf16.enabled` the forward and backward pass run on bf16 weights, which are a rounded copy of fp32 masters,
and gradients accumulate in fp32 (`data_types.grad_accum_dtype`). So no update is lost to rounding, as it is where bf16
weights are all there is (PRX measured FID 21.9 for those against 18.2 with fp32 weights under autocast); autocast over fp32
weights would cost another 2 bytes a parameter and a cast of each weight in each micro-batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.state import Slot

LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
RENDEZVOUS = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=30)
    """The longest that a collective may take."""


def start(timeout: timedelta = timedelta(minutes=30)) -> World:
    """Joins the processes that a launcher started (RANK, WORLD_SIZE, …), or starts alone where there is none.

    Args:
        timeout: the longest that a collective may take. The processes have RENDEZVOUS to find one another.

    Raises:
        ValueError: a launcher set some of the variables only, or there are fewer GPUs than processes on this node.
        RuntimeError: the processes did not find one another.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        os.environ.update(LAUNCHER | {"MASTER_PORT": os.environ.get("MASTER_PORT", "0")})
    if missing := [v for v in (*LAUNCHER, "MASTER_PORT") if v not in os.environ]:
        raise ValueError(
            f"the launcher did not set {', '.join(missing)}; torchrun and slurm/*.sh set all that is needed"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not gpus and named.startswith((*"0123456789", "GPU-", "MIG-")):
        # It would train on the CPU, or wait for the others, who do not.
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={named} names GPUs, but torch finds none on {socket.gethostname()}: see nvidia-smi there; "
            "unset it to train on the CPU"
        )
    if gpus and local_rank >= gpus:
        raise ValueError(f"local rank {local_rank} has no GPU: this node shows {gpus}; start one process per GPU")
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    else:
        # Else the first start on a CPU compiles a collective that training does not use: over a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        backend = "nccl" if gpus else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=RENDEZVOUS, verbose=False)
    except dist.DistError as error:
        raise RuntimeError(
            f"no rendezvous at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]}); "
            "another program has this MASTER_PORT, or not all processes started: see what they say"
        ) from error
    dist.distributed_c10d._set_pg_timeout(timeout)
    return World(dist.get_rank(), dist.get_world_size(), device, timeout)


def gather(item: Any, world: World) -> list[Any]:
    """Every process's item, in order of their numbers."""
    items: list[Any] = [item]
    if world.size > 1:
        items = [None] * world.size
        dist.all_gather_object(items, item)
    return items


def barrier(world: World) -> None:
    """Waits until all processes are here."""
    if world.size > 1:
        dist.barrier()


@dataclass(frozen=True)
class GradientCheck:
    """What was found of a step's gradient: its norm over all processes, and whether it may be applied."""

    norm: Tensor
    admitted: bool


class Engine:
    """A model under ZeRO-2.

    Attributes:
        module: the model; its weights are the rounded masters.
        masters: this process's slice of each group's fp32 parameters.
        slots: where every parameter lies; the same for every number of processes.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], world: World):
        self.world = world
        names = {id(p): n for n, p in model.named_parameters()}
        # DeepSpeed makes the masters from weights already rounded to bf16; the exact ones are put back below.
        exact = {n: p.detach().to("cpu", torch.float32, copy=True) for n, p in model.named_parameters()}
        config = {**config, "zero_allow_untested_optimizer": True, "steps_per_print": 2**31}
        self._engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[
            0
        ]
        self._zero = self._engine.optimizer
        if (group := self._zero.dp_process_group) is not None:  # DeepSpeed makes it with a timeout of torch's
            dist.distributed_c10d._set_pg_timeout(world.timeout, group)
        # One pass over the gradients serves clipping and the judge; DeepSpeed by itself looks at them twice.
        self._zero.check_grad_overflow = True
        self._zero.check_overflow = self._look
        self._zero.scaled_global_norm = lambda norm_type=2: self._norm
        self.module: nn.Module = self._engine.module
        self.dtype = next(self.module.parameters()).dtype
        self.masters: list[Tensor] = list(self._zero.single_partition_of_fp32_groups)
        self.slots = [
            Slot(names[id(p)], tuple(p.shape), group, (p.data_ptr() - flat.data_ptr()) // flat.element_size())
            for group, (parameters, flat) in enumerate(
                zip(self._zero.bit16_groups, self._zero.bit16_groups_flat, strict=True)
            )
            for p in parameters
        ]
        for master in self.masters:
            master.detach().zero_()  # what is padding stays so
        self.fill(self.masters, exact.__getitem__)
        self.publish(self.masters)

    # ---- a step ----

    def forward(self, *inputs: Any) -> Any:
        """The module's prediction, seen by DeepSpeed."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch; the mean over micro-batches is taken here."""
        self._engine.backward(loss)

    def step(self, lr: float, judge: Callable[[Tensor], GradientCheck]) -> None:
        """Ends a micro-batch. At an accumulation boundary: reduces, clips, and updates with this learning rate.

        Args:
            judge: told this process's share of the gradient's squared norm (fp64); where it does not admit the step, nothing
                is updated. It must come to the same verdict on all processes.
        """
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._judge = judge
        self._engine.step()

    def _look(self, partition_gradients: bool = True) -> None:
        """In place of DeepSpeed's search for overflow."""
        mine = [g for some in self._zero.averaged_gradients.values() for g in some if g is not None]
        device = self.masters[0].device
        squared = torch.zeros((), dtype=torch.float64, device=device)
        if mine:
            squared = torch.stack(torch._foreach_norm(mine, 2, torch.float32)).double().square().sum()
        look = self._judge(squared)
        self._norm, self._zero.overflow = look.norm, not look.admitted

    @property
    def applied(self) -> bool:
        """Whether the last step updated the parameters."""
        return self._engine.was_step_applied()

    # ---- this process's share ----

    def moments(self) -> dict[str, list[Tensor]]:
        """AdamW's `exp_avg` and `exp_avg_sq` of each master, zeros before the first step."""
        state = self._zero.optimizer.state
        for master in self.masters:
            if not state[master]:
                state[master] = {
                    "step": torch.zeros((), device=master.device if self._fused else "cpu"),
                    "exp_avg": torch.zeros_like(master, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
                }
        return {k: [state[m][k] for m in self.masters] for k in ("exp_avg", "exp_avg_sq")}

    @property
    def _fused(self) -> bool:
        return bool(self._zero.param_groups[0].get("fused"))

    @property
    def updates(self) -> int:
        """AdamW's own count of updates, by which it corrects its moments' bias."""
        self.moments()
        return int(self._zero.optimizer.state[self.masters[0]]["step"].item())

    @updates.setter
    def updates(self, count: int) -> None:
        self.moments()
        for master in self.masters:
            self._zero.optimizer.state[master]["step"].fill_(count)

    @torch.no_grad()
    def fill(self, shares: list[Tensor], read: Callable[[str], Tensor | None]) -> None:
        """Fills this process's slices from whole parameters, `read(name)` [shape] each; None leaves one as it is."""
        for group, share in enumerate(shares):
            start = self.world.rank * share.numel()
            for slot in self.slots:
                low, high = max(slot.offset, start), min(slot.offset + slot.numel, start + share.numel())
                if slot.group == group and low < high and (whole := read(slot.name)) is not None:
                    mine = whole.reshape(-1)[low - slot.offset : high - slot.offset]
                    share[low - start : high - start] = mine.to(share)

    @torch.no_grad()
    def publish(self, shares: list[Tensor]) -> None:
        """Rounds each process's slices into the module's weights, on all processes: the masters, or the average."""
        for group, share in enumerate(shares):
            flat = self._zero.bit16_groups_flat[group]
            own = self._zero.parallel_partitioned_bit16_groups[group][self.world.rank]
            own.data.copy_(share)
            if self.world.size > 1:
                dist.all_gather_into_tensor(flat.data, own.data.clone())

    @property
    def layout(self) -> list[dict[str, Any]]:
        """The slots, as they are kept in a checkpoint."""
        return [asdict(s) for s in self.slots]

    @property
    def layout_hash(self) -> str:
        """A hash of names, shapes and groups in order."""
        return hashlib.sha256(json.dumps([[s.name, s.shape, s.group] for s in self.slots]).encode()).hexdigest()


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
