"""Whole training steps under ZeRO-2, one process for each GPU: as the shipped stages are configured, with made micro-batches.

One micro-batch of the stage's size in each process and step (half of it on fewer than four GPUs, which have larger shares of the
optimizer's state); spike guard, average, monitor and watchdog are those of a training. First one step of a small model against
AdamW.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

from data_prep.common.words import counted
from pretrain import training
from pretrain.bench.gpu.session import Numbers, Session, fits_in
from pretrain.bench.made import made_batch, made_trainer
from pretrain.config import Config, load
from pretrain.distributed.engine import Engine, GradientCheck
from pretrain.distributed.rendezvous import init_distributed, shutdown
from pretrain.distributed.world import World
from pretrain.models.cost import training_flops
from pretrain.resilience.capacity import activation_bytes, state_bytes
from pretrain.resilience.signals import StopRequest
from pretrain.state import RunState

STEPS, WARM_UP = 6, 3


def run(session: Session) -> None:
    """Measures steps of both stages, and compares one step with AdamW."""
    world = init_distributed()
    try:
        session.measure("one step against AdamW in fp64", _against_adamw, world)
        stages = ("demo_256",) if session.settings.small else ("stage1_256", "stage2_512")
        for stage in stages:
            session.measure(f"{stage}, {counted(world.size, 'process', 'processes')}", _steps, world, stage, needs=10)
    finally:
        shutdown()


def settings(session: Session, world: World, stage: str, **changes: Any) -> tuple[Config, dict[str, Any]]:
    """A shipped stage's settings for this number of processes, without accumulation."""
    small, images = session.settings.small, {"stage1_256": 64, "stage2_512": 20}.get(stage, 2)
    if world.size < 4 and not small:
        images //= 2
    words = {
        "run_dir": session.folder / f"{stage}_{session.settings.device.replace(':', '_')}",
        "preview.every": 0,
        "logging.every": 1000,
        "optimizer.name": "adamw",
        "init_from": "null",
        "deepspeed.train_batch_size": images * world.size,
        "deepspeed.train_micro_batch_size_per_gpu": images,
    } | changes
    if small:
        words["data.resolution"] = 64
    else:
        words["model.preset"] = session.settings.preset
    config, deepspeed = load(stage, [f"{key}={value}" for key, value in words.items()])
    return config, deepspeed | {"gradient_accumulation_steps": 1}


@contextmanager
def trainer(config: Config, deepspeed: dict[str, Any], world: World) -> Any:
    """A trainer, closed afterwards."""
    stop = StopRequest()
    t = made_trainer(config, deepspeed, world, stop)
    try:
        yield t
    finally:
        t.watchdog.close()
        t.monitor.close()
        stop.close()


def _steps(session: Session, world: World, stage: str) -> Numbers:
    config, deepspeed = settings(session, world, stage)
    images = deepspeed["train_micro_batch_size_per_gpu"]
    lengths = session.lengths(images, seed=world.rank)
    with trainer(config, deepspeed, world) as t:
        batch, state, seconds = made_batch(config, lengths), RunState(), []
        warm_up, steps = (1, 1) if session.settings.small else (WARM_UP, STEPS)
        for _ in range(warm_up + steps):
            start = time.perf_counter()
            state = training.train_step(t, [batch], state)
            session.wait()
            seconds.append(time.perf_counter() - start)
        step, grid = statistics.median(seconds[warm_up:]), t.monitor.grid
    numbers = {
        "ms": 1e3 * step,
        "images/s": images * world.size / step,
        "micro-batch": images,
        "first step s": seconds[0],
        "all applied": state.updates == warm_up + steps,
    }
    if session.gpu:
        flops = training_flops(config.model.backbone(), images, grid, sum(lengths))
        numbers["MFU %"] = 100 * flops / step / (session.gpu.bf16_tflops * 1e12)
    if (peak := session.peak_gib()) is not None:
        planned = state_bytes(config, deepspeed, world.size) + activation_bytes(config, images)
        numbers |= {"peak GiB": peak, "planned GiB": planned / 2**30}
    return numbers


def _against_adamw(session: Session, world: World) -> Numbers:
    """The masters of a linear map after one step, against AdamW in fp64 on the mean gradient of all processes."""
    torch.manual_seed(0)
    module = torch.nn.Linear(64, 64, bias=False).to(session.device)
    weight = module.weight.detach().double().clone()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.0)
    deepspeed: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": session.cuda},
        "zero_optimization": {"stage": 2},
    }
    engine = Engine(module, optimizer, deepspeed, world)
    inputs = [torch.randn(8, 64, generator=torch.Generator().manual_seed(rank)) for rank in range(world.size)]
    x = inputs[world.rank].to(session.device, engine.dtype)
    engine.backward(engine.forward(x).float().square().mean())
    admit: Callable[[Any], GradientCheck] = lambda norm: GradientCheck(norm.sqrt().float(), admitted=True)  # noqa: E731
    engine.step(0.01, admit)
    reference = weight.requires_grad_()
    everything = torch.cat(inputs).to(session.device, engine.dtype).double()
    (everything @ reference.T).square().mean().backward()
    torch.optim.AdamW([reference], lr=0.01, weight_decay=0.0).step()
    # A gradient near 0 may round to either side, where Adam's first step has its full length.
    engine_weight = engine.module.weight.detach().double()  # type: ignore[operator]
    apart = (engine_weight - reference.detach()).abs().mean().item() / 0.01
    return fits_in(apart, 0.2 if session.cuda else 1e-3, {"processes": world.size, "applied": engine.applied})
