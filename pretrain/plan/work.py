"""A stage's work and network, as the simulation takes them: from FLOPs, data sheets and the gradients' own buckets."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from pretrain.config import OptimizerSection
from pretrain.distributed.gradients import cut_into_buckets
from pretrain.distributed.optimizer import build_optimizer
from pretrain.distributed.partition import Slot
from pretrain.models import DiT, DiTConfig
from pretrain.plan.setting import Cluster
from pretrain.plan.simulation import Bucket, Network, Work
from pretrain.plan.stage import Stage

# Assumed: the share of the data sheet's bandwidths that collectives and the optimizer reach, and the seconds of a ring's hop.
COLLECTIVE_SHARE, MEMORY_SHARE = 0.8, 0.9
LINK_S, NETWORK_S = 2e-6, 6e-6
# Bytes that one element of a partition moves: its norm 4, clipping 8, AdamW 28 (reads gradient, master and two moments, writes
# three of them), rounding to bf16 6; and each average's.
OPTIMIZER_BYTES, AVERAGE_BYTES = 46, 12
AGREEMENTS = 1  # the spike guard's sum of loss and norm
DEEPSPEEDS_BUCKET = 500_000_000  # elements, where a config names none
ALIGNMENT = 2  # DeepSpeed pads a group to a multiple of this times the processes


def network_of(cluster: Cluster) -> Network:
    """The links of a cluster."""
    rates = (COLLECTIVE_SHARE * cluster.gpu.link_gbs, COLLECTIVE_SHARE * cluster.network_gbs)
    return Network(cluster.gpus_per_node, *rates, LINK_S, NETWORK_S)


def work_of(stage: Stage, jitter: float, overlap: bool) -> Work:
    """The work of each GPU in one of the stage's steps, at its MFU."""
    gpus, micro, gpu = stage.cluster.gpus, stage.micro, stage.cluster.gpu
    moved = OPTIMIZER_BYTES + AVERAGE_BYTES * len(stage.config.optimizer.averages())
    forward = micro.images * stage.training_flops / 3 / (gpu.bf16_tflops * 1e12 * stage.setting.mfu)
    bucket_size = int(stage.deepspeed["zero_optimization"].get("reduce_bucket_size", DEEPSPEEDS_BUCKET))
    return Work(
        micro_batches=stage.batch // (gpus * micro.images),
        forward_s=forward,
        backward_s=(3 if micro.recompute else 2) * forward,
        buckets=buckets_of(stage.model, stage.config.optimizer.name == "muon", bucket_size, gpus),
        overlap=overlap,
        exchange_size=4 * stage.parameters / gpus,
        optimizer_s=moved * stage.parameters / gpus / (MEMORY_SHARE * gpu.memory_tbs * 1e12),
        gather_size=(2 if stage.bf16 else 4) * stage.parameters,
        agreements=AGREEMENTS,
        jitter=jitter,
    )


@lru_cache
def buckets_of(c: DiTConfig, muon: bool, bucket_size: int, processes: int) -> tuple[Bucket, ...]:
    """The buckets into which training cuts the gradients, in their order; blocks are taken to have equal backward passes."""
    with torch.device("meta"):
        model = DiT(c)
    names = {id(p): name for name, p in model.named_parameters()}
    slots: dict[int, Slot] = {}
    sizes = []
    for index, group in enumerate(
        build_optimizer(model, OptimizerSection(name="muon" if muon else "adamw")).param_groups
    ):
        offset = 0
        for p in group["params"]:
            slots[id(p)] = Slot(names[id(p)], tuple(p.shape), index, offset)
            offset += p.numel()
        unit = ALIGNMENT * processes
        sizes.append(math.ceil(offset / unit) * unit)
    ordered = {p: slots[p] for p in names}
    ready = _ready(list(names.values()), c.depth)
    return tuple(
        Bucket(4 * len(b.range), max((ready[names[p]] for p in b.parameters), default=1.0))
        for b in cut_into_buckets(ordered, sizes, bucket_size, processes)
    )


def _ready(names: list[str], depth: int) -> dict[str, float]:
    """The share of the backward pass after which each parameter's gradient is complete; `names` in the forward pass's order."""
    ready, in_blocks = {}, False
    for name in names:
        if name.startswith("blocks."):
            in_blocks = True
            ready[name] = (depth - int(name.split(".")[1])) / depth
        else:
            ready[name] = 0.0 if in_blocks else 1.0
    return ready
