"""Bytes of the tensors that a training process holds after a step, by purpose; run in processes of their own by `fork`."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import training
from pretrain.bench.made import made_batch, made_trainer
from pretrain.config import load
from pretrain.distributed.rendezvous import init_distributed, shutdown
from pretrain.resilience.capacity import states
from pretrain.resilience.signals import StopRequest
from pretrain.state import RunState


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of the storages of all tensors among these objects, by their place in memory: each once, whatever views it has."""
    held = [t for t in tensors if isinstance(t, Tensor) and t.device.type == "cpu" and t.layout == torch.strided]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}


def measure(out: Path, words: list[str]) -> int:
    """Takes two steps of two micro-batches, and writes the planned and the measured bytes of this process."""
    torch.set_num_threads(1)
    config, deepspeed = load("demo_256", words)
    before = storages(gc.get_objects())
    world, stop = init_distributed(), StopRequest()
    deepspeed |= {"gradient_accumulation_steps": 2}
    t = made_trainer(config, deepspeed, world, stop)
    batch, state = made_batch(config, [4] * deepspeed["train_micro_batch_size_per_gpu"]), RunState()
    for _ in range(2):
        state = training.train_step(t, [batch, batch], state)
    gc.collect()
    everything = storages(gc.get_objects())
    moments = t.engine.moments()
    named = {
        "weights": storages(t.model.parameters()),
        "masters": storages(t.engine.masters),
        "moments": storages([*moments["exp_avg"], *moments["exp_avg_sq"]]),
        "average": storages(p for average in t.ema.partitions.values() for p in average),
        "gradients": storages(t.engine.gradients),
    }
    measured = {name: sum(found.values()) for name, found in named.items()}
    known = {place for found in named.values() for place in found} | before.keys()
    measured["rest"] = sum(size for place, size in everything.items() if place not in known)
    planned = asdict(states(config, deepspeed, world.size))
    (out / f"{world.rank}.json").write_text(json.dumps({"planned": planned, "measured": measured}))
    t.watchdog.close()
    t.monitor.close()
    stop.close()
    shutdown()
    return 0
