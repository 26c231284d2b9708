"""The optimizer's parameter groups, and the learning rate as a function of the step alone."""

from __future__ import annotations

import math

import torch
from torch import nn

from pretrain.config import OptimizerSection
from pretrain.distributed.muon import Muon


def build_optimizer(model: nn.Module, config: OptimizerSection) -> torch.optim.AdamW:
    """Makes AdamW over two groups: weight matrices, which decay, and biases, tables and vectors, which do not.

    With `name: muon` the matrices inside the blocks (`DiT.hidden_matrices`) are a third group, which is Muon's.
    """
    hidden: list[nn.Parameter] = model.hidden_matrices if config.name == "muon" else []  # type: ignore[assignment]
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for parameter in model.parameters():
        if not any(parameter is h for h in hidden):
            (decay if id(parameter) in matrices else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type == "cuda"
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    groups.append({"params": hidden, "weight_decay": config.weight_decay, "muon": True})
    return Muon(groups, config.momentum, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(step: int, steps: int, config: OptimizerSection) -> float:
    """The learning rate of optimizer step number `step`, counted from 0, in a run of `steps` steps (OptimizerSection)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
