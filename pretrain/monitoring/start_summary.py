"""What a start shows: model, device, data, batch, how much is to go, and where to watch it."""

from __future__ import annotations

import socket
from typing import Any

import torch

from data_prep.common.words import counted
from pretrain.config import Config
from pretrain.data.epoch_plan import EpochPlan
from pretrain.distributed.world import World, all_gather
from pretrain.models.cost import count_parameters


def start_summary(config: Config, deepspeed: dict[str, Any], plan: EpochPlan, world: World, step: int) -> str:
    """A block of five lines for the log of a start that has `step` steps done. All processes call it."""
    hosts = len(set(all_gather(socket.gethostname(), world)))
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else "CPU"
    where = f"{counted(world.size, 'process', 'processes')} on {counted(hosts, 'node')}"
    backbone = config.model.backbone()
    parameters = count_parameters(backbone).total
    precision = "bf16" if deepspeed.get("bf16", {}).get("enabled") else "fp32"
    batch, micro = deepspeed["train_batch_size"], deepspeed["train_micro_batch_size_per_gpu"]
    micros = counted(batch // (world.size * micro), "micro-batch", "micro-batches")
    samples = sum(plan.draws.values())
    to_go = max(0, config.steps - step)
    to_do = f"{to_go:,} of {counted(config.steps, 'step')}, {to_go * batch:,} images"
    epoch = f"{samples:,} samples an epoch of {counted(samples // batch, 'step')}"
    methods = {config.routing.name: config.routing.build(backbone), "alignment": config.alignment.build(backbone)}
    until = [f"{name} up to step {method.steps(config.steps):,}" for name, method in methods.items() if method]
    lines = (
        f"model: {config.model.preset}, {parameters / 1e6:,.1f}M parameters, in {precision} on {device}, {where}",
        f"data:  {config.data.path} at {config.data.resolution} px, {epoch}",
        f"batch: {batch} images = {world.size} × {micros} of {micro}",
        f"to go: {to_do}, {to_go * batch / samples:,.1f} epochs, by {', '.join([config.optimizer.name, *until])}",
        f"watch: tensorboard --logdir {config.run_dir}",
    )
    return "\n".join(lines)
