"""Training of one stage: `build` wires its parts, `train` is the loop over its steps, `train_step` is one of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from data_prep.common.words import counted
from pretrain.checkpoint.writer import CheckpointWriter
from pretrain.compilation import compile_for_training
from pretrain.config import Config, geometry, load
from pretrain.console import log_from_first
from pretrain.data.batch import Batch
from pretrain.data.loader import Loader
from pretrain.distributed import optimizer as optim
from pretrain.distributed.ema import Ema
from pretrain.distributed.engine import Engine
from pretrain.distributed.launcher import LauncherWatch
from pretrain.distributed.rendezvous import init_distributed, shutdown
from pretrain.distributed.world import World
from pretrain.fp8 import use_fp8
from pretrain.loss import TrainingLoss, model_to_train
from pretrain.models import DiT
from pretrain.monitoring.monitor import Monitor
from pretrain.monitoring.preview import Preview
from pretrain.monitoring.provenance import save_provenance
from pretrain.monitoring.start_summary import start_summary
from pretrain.monitoring.validation import Validation
from pretrain.resilience import preflight
from pretrain.resilience.failure import report_failure
from pretrain.resilience.heartbeat import IN_STEP
from pretrain.resilience.node_checks import raise_open_files
from pretrain.resilience.recovery import Recovery
from pretrain.resilience.run_lock import RunLock
from pretrain.resilience.signals import REQUEUE, StopRequest
from pretrain.resilience.spike_guard import SpikeGuard
from pretrain.resilience.watchdog import STARTUP_FACTOR, Watchdog
from pretrain.state import RunState


@dataclass(frozen=True)
class Trainer:
    """The parts of a training."""

    config: Config
    deepspeed: dict[str, Any]
    loader: Loader
    model: DiT
    engine: Engine
    ema: Ema
    loss: TrainingLoss
    guard: SpikeGuard
    watchdog: Watchdog
    monitor: Monitor
    preview: Preview
    validation: Validation
    saver: CheckpointWriter
    recovery: Recovery


def run(name: str, overrides: list[str]) -> int:
    """Trains a stage, from its newest checkpoint on; returns the command's exit code."""
    stop, watchdog, lock = None, None, None
    try:
        raise_open_files()
        config, deepspeed = load(name, overrides)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        stop = StopRequest(config.checkpoint.time_limit, LauncherWatch())
        # A collective's own limit is for what the watchdog cannot see: the watchdog comes first, and says more.
        world = init_distributed(timedelta(seconds=2 * STARTUP_FACTOR * config.guard.seconds))
        watchdog = Watchdog(world, config.guard.seconds).start()
        preflight.require(config, deepspeed, world)
        lock = RunLock(config.run_dir, world, partial(log_from_first, world.rank))
        lock.acquire()
        stopped = train(build(config, deepspeed, world, stop, watchdog, lock))
    except Exception as error:
        if lock:
            lock.release()  # here, too: the next line may end the process
        return report_failure(error, watchdog)
    finally:
        if lock:
            lock.release()
        if stop:
            stop.close()
        if watchdog:
            watchdog.close()
        shutdown()
    return REQUEUE if stopped else 0


def build(
    config: Config, deepspeed: dict[str, Any], world: World, stop: StopRequest, watchdog: Watchdog, lock: RunLock
) -> Trainer:
    """Wires the parts in the order of the data; `lock` holds the run directory."""
    run_info = {"config": config.model_dump(mode="json"), "deepspeed": deepspeed}
    accumulation = geometry(deepspeed, world.size)
    deepspeed = {**deepspeed, "gradient_accumulation_steps": accumulation}
    backbone = config.model.backbone()
    batch, micro = deepspeed["train_batch_size"], deepspeed["train_micro_batch_size_per_gpu"]
    loader = Loader(config, backbone, batch, micro, world)
    preview = Preview(config, loader.card, loader.root, world)
    objective = config.objective.build()
    validation = Validation(config, loader, objective, watchdog.begin, lambda: stop.code != 0)
    torch.manual_seed(config.seed)
    model = model_to_train(config, loader.card).to(world.device)
    model.recompute = config.model.recompute
    if config.model.fp8:
        use_fp8(model, config.model.fp8)
    if config.model.compile:
        compile_for_training(model)
    optimizer = optim.build_optimizer(model, config.optimizer)
    zero = Engine(model, optimizer, deepspeed, world, model.reused_parameters)
    ema = Ema(zero, config.optimizer)
    guard = SpikeGuard(config.guard, world, stop)
    monitor = Monitor(config, backbone, zero, loader.steps_per_epoch, loader.data.sources)
    loss = TrainingLoss(config, zero, objective, monitor)
    saver = CheckpointWriter(config, zero, ema, {"data": loader.fingerprint, **run_info})
    log = partial(log_from_first, world.rank)
    recovery = Recovery(config, loader, zero, ema, guard, watchdog, monitor, saver, lock, log)
    parts = (config, deepspeed, loader, model, zero, ema, loss, guard, watchdog, monitor, preview, validation)
    return Trainer(*parts, saver, recovery)


def train(t: Trainer) -> str | None:
    """Trains to the last step, or until a process is asked to stop; returns what asked for it, None at the end."""
    config, recovery = t.config, t.recovery
    state = recovery.start()
    save_provenance(config, t.deepspeed, t.loader, t.engine.world)  # not of a start that was refused
    recovery.lock.keep()
    recovery.record_start(state.step)
    recovery.log(start_summary(config, t.deepspeed, t.loader.plan, t.engine.world, state.step))
    t.watchdog.step = state.step
    batches = recovery.batches(state)
    if state.step == 0 and t.validation.due(0):
        t.validation.run(t.engine, t.model, t.ema, t.monitor, 0)
    while state.step < config.steps:
        step_batches = next(batches)
        state = replace(train_step(t, step_batches, state), position=t.loader.position)
        verdict = t.guard.verdict
        t.watchdog.finish_step(state.step)
        if verdict.damaged:
            recovery.count_damaged_shards(step_batches)
        if verdict.fault:
            recovery.report_skipped_step(state)
            if state.history.in_a_row >= config.guard.patience:
                state = recovery.roll_back(state)
                batches = recovery.batches(state)
                continue
        if t.preview.due(state.step):
            t.watchdog.begin("drawing the preview")
            t.preview.draw(t.model, t.ema, t.monitor, state.step)
        if t.validation.due(state.step):
            t.validation.run(t.engine, t.model, t.ema, t.monitor, state.step)
        last = state.step == config.steps or verdict.stop > 0
        if state.step % config.checkpoint.every == 0 or last:
            recovery.save(state, wait=last)
        recovery.log_saved()
        if verdict.stop and state.step < config.steps:
            reason = t.guard.stop_reason()
            recovery.log(f"stopped by {reason} after step {state.step}; started again, it goes on from there")
            return reason
    t.monitor.close()
    recovery.log(
        f"{config.name} is complete: {counted(state.step, 'step')}, {counted(state.images, 'image')}; {config.run_dir}"
    )
    return None


def train_step(t: Trainer, batches: list[Batch], state: RunState) -> RunState:
    """Takes one optimizer step over this process's micro-batches; `t.guard.verdict` says whether it was applied."""
    zero, window = t.engine, t.config.guard.window
    lr = optim.learning_rate(state.step, t.config.steps, t.config.optimizer)
    t.watchdog.begin(IN_STEP)
    plan = t.loss.plan(state.step)
    t.guard.begin(state.history, plan.group)
    for host_batch in batches:
        batch = host_batch.to(zero.world.device, zero.dtype)
        loss = t.loss.compute(batch, plan)
        t.guard.add(batch.keys, loss, len(batch.damaged))
        zero.backward(loss.total)
        zero.step(lr, t.guard.judge)
    if zero.applied:
        t.ema.update(state.updates)
    t.monitor.step(state.step + 1, t.guard.verdict, lr)
    images = zero.world.size * sum(len(batch.keys) for batch in batches)
    return replace(
        state,
        step=state.step + 1,
        updates=state.updates + zero.applied,
        images=state.images + images,
        history=state.history.after(t.guard.verdict, window),
    )
