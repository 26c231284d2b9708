"""Training: python -m pretrain.train CONFIG [section.key=value ...]

Runs under any launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT (torchrun,
slurm/*.sh), or alone as one process. Started again, it goes on at the exact next sample of its newest whole checkpoint.

Exit codes: 0 the stage is complete; 75 to be started again (asked to stop, or a process was lost); 1 an error; 2 wrong usage.
docs/operations.md says what happens at each fault.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch

from pretrain.checkpoint import reader as checkpoint
from pretrain.checkpoint.reader import RunState
from pretrain.checkpoint.restore import inherit, resume
from pretrain.checkpoint.writer import Saver
from pretrain.config import Config, geometry, load
from pretrain.console import silence_libraries
from pretrain.data.loader import Batch, Loader
from pretrain.diffusion import Loss, Objective, draw, measure
from pretrain.diffusion.step_budget import StepEffort, step_effort
from pretrain.distributed import engine
from pretrain.distributed import optimizer as optim
from pretrain.distributed.ema import Ema
from pretrain.distributed.engine import Engine, World, barrier, gather
from pretrain.models import DiT
from pretrain.models.focusdit.mask import draw_keep
from pretrain.monitoring.monitor import Monitor
from pretrain.monitoring.preview import Preview
from pretrain.monitoring.provenance import keep_what_is_used
from pretrain.resilience import preflight
from pretrain.resilience.requeue import note_start
from pretrain.resilience.signals import REQUEUE, Stop
from pretrain.resilience.spike_guard import SKIPPED, SpikeGuard
from pretrain.resilience.watchdog import STARTING, WAITING, Watchdog


@dataclass(frozen=True)
class Trainer:
    """The parts of a training."""

    config: Config
    deepspeed: dict[str, Any]
    loader: Loader
    model: DiT
    engine: Engine
    ema: Ema
    objective: Objective
    guard: SpikeGuard
    watchdog: Watchdog
    monitor: Monitor
    preview: Preview
    saver: Saver
    damaged: set[str] = field(default_factory=set)
    """Shards that proved damaged since the start."""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Trains a stage; every field of a config can be overridden.")
    parser.add_argument("config", help="a stage's name, or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value, or deepspeed.key=value")
    parser.add_argument("--check", action="store_true", help="look at all that the training needs, and do not train")
    parser.add_argument("--processes", type=int, help="with --check on a login node: the processes it is planned for")
    args = parser.parse_intermixed_args(argv)
    silence_libraries()
    stop, watchdog = None, None
    try:
        if args.check:
            return preflight.check(args.config, args.overrides, args.processes)
        config, deepspeed = load(args.config, args.overrides)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        stop = Stop(config.checkpoint.time_limit)
        # The watchdog comes first and says more; a collective's own limit is for what it cannot see.
        world = engine.start(timedelta(seconds=2 * STARTING * config.guard.seconds))
        watchdog = Watchdog(world, config.guard.seconds)
        preflight.require(config, deepspeed, world)
        stopped = train(build(config, deepspeed, world, stop, watchdog))
    except Exception as error:
        if os.environ.get("FOCUSDIT_TRACEBACK"):
            raise
        if not isinstance(error, ValueError | OSError | RuntimeError):
            traceback.print_exc()  # a defect: not a line's worth of explanation
        line, code = watchdog.failed(error) if watchdog else (str(error), 1)
        rank = os.environ.get("RANK", "0")
        print(f"train: process {rank}: {line}" if rank != "0" else f"train: {line}", file=sys.stderr, flush=True)
        if watchdog and world.size > 1:
            os._exit(code)  # leaving a broken group in good order may wait for the others
        return code
    finally:
        if stop:
            stop.close()
        if watchdog:
            watchdog.close()
        engine.stop()
    return REQUEUE if stopped else 0


def build(config: Config, deepspeed: dict[str, Any], world: World, stop: Stop, watchdog: Watchdog) -> Trainer:
    """Wires the parts in the order of the data."""
    accumulation = geometry(deepspeed, world.size)
    deepspeed = {**deepspeed, "gradient_accumulation_steps": accumulation}
    config.run_dir.mkdir(parents=True, exist_ok=True)
    backbone = config.model.backbone()
    batch, micro = deepspeed["train_batch_size"], deepspeed["train_micro_batch_size_per_gpu"]
    loader = Loader(config, backbone, batch, micro, world.rank, world.size)
    preview = Preview(config, loader.card, loader.root, world)
    torch.manual_seed(config.seed)
    model = DiT(backbone).to(world.device)
    model.recompute = config.model.recompute
    if config.model.compile:
        for block in model.blocks:
            block.compile()
    zero = Engine(model, optim.build(model, config.optimizer), deepspeed, world)
    ema = Ema(zero, config.optimizer.ema_decay)
    guard = SpikeGuard(config.guard, world, stop)
    monitor = Monitor(config, backbone, zero)
    about = {"data": loader.fingerprint, "config": config.model_dump(mode="json")}
    saver = Saver(config, zero, ema, about)
    objective = config.objective.build()
    return Trainer(config, deepspeed, loader, model, zero, ema, objective, guard, watchdog, monitor, preview, saver)


def train(t: Trainer) -> str | None:
    """Runs to the last step (None), or until some process is asked to stop (by what)."""
    config, monitor = t.config, t.monitor
    progress = begin(t)
    keep_what_is_used(config, t.deepspeed, t.loader, t.engine.world)  # not of a start that was refused
    note(t, progress.step)
    t.watchdog.step = progress.step
    batches = timed(t, progress)
    while progress.step < config.steps:
        step_batches = next(batches)
        progress = replace(train_step(t, step_batches, progress), position=t.loader.position)
        step, verdict = progress.step, t.guard.verdict
        t.watchdog.done(step)
        if verdict.damaged:
            count_damaged(t, step_batches)
        if verdict.fault:
            tell_of_fault(t, progress)
            if progress.health.in_a_row >= config.guard.patience:
                progress = roll_back(t, progress)
                batches = timed(t, progress)
                continue
        last = step == config.steps or verdict.stop > 0
        if t.preview.due(step):
            t.watchdog.at("drawing the preview")
            with monitor.paused():
                t.preview.draw(t.model, t.ema, monitor, step)
        if step % config.checkpoint.every == 0 or last:
            save(t, progress, wait=last)
        if news := t.saver.news():
            log(t, news)
        if verdict.stop and step < config.steps:
            why = t.guard.stopped_by()
            log(t, f"stopped by {why} after step {step}; started again, it goes on from there")
            return why
    monitor.close()
    log(t, f"{config.name} is complete: {progress.step} steps, {progress.images} images; {config.run_dir}")
    return None


def train_step(t: Trainer, batches: list[Batch], progress: RunState) -> RunState:
    """One optimizer step over this process's micro-batches; `t.guard.verdict` tells whether it was applied."""
    zero, window = t.engine, t.config.guard.window
    lr = optim.learning_rate(progress.step, t.config.steps, t.config.optimizer)
    t.watchdog.at(WAITING)
    spent = step_effort(t.model.config, t.objective, t.config.seed, progress.step)
    t.guard.begin(progress.health, spent.effort.bin or 0)
    for host_batch in batches:
        batch = host_batch.to(zero.world.device, zero.dtype)
        loss = forward(t, batch, spent)
        t.guard.add(batch.keys, loss, len(batch.damaged))
        zero.backward(loss.mean)
        zero.step(lr, t.guard)
    if zero.applied:
        t.ema.update(progress.updates)
    t.monitor.step(progress.step + 1, t.guard.verdict, lr)
    return replace(
        progress,
        step=progress.step + 1,
        updates=progress.updates + zero.applied,
        images=progress.images + zero.world.size * sum(len(b.keys) for b in batches),
        health=progress.health.after(t.guard.verdict, window),
    )


def forward(t: Trainer, batch: Batch, spent: StepEffort) -> Loss:
    """A micro-batch's loss. All random numbers of a sample come from its own seed, what is computed from the step."""
    device, backbone = t.engine.world.device, t.model.config
    numbers = draw(batch.seeds, batch.mean_BCHW.shape, device)
    noisy = t.objective.corrupt(
        batch.latent(numbers.posterior_BCHW), numbers.noise_BCHW, spent.narrow(numbers.uniform_B)
    )
    keep_KBN = None
    if backbone.mask != "none" and backbone.mask_dropout:
        tokens = noisy.noisy_BCHW[0, 0].numel() // backbone.patch**2
        keep_KBN = draw_keep(batch.seeds, backbone.depth, tokens, backbone.mask_dropout, device)
    latent_BCHW = noisy.noisy_BCHW.to(t.engine.dtype)
    prediction = t.engine.forward(latent_BCHW, noisy.timestep_B, batch.text, None, keep_KBN, spent.effort)
    loss = measure(prediction.sample_BCHW, noisy)
    t.monitor.record(batch, loss, prediction.masks_KBN, spent.effort)
    return loss


def begin(t: Trainer) -> RunState:
    """From the run's own newest whole checkpoint, else from another run's weights, else from nothing."""
    config, world = t.config, t.engine.world
    if own := checkpoint.newest_whole(config.run_dir, world, lambda line: log(t, line)):
        progress = take_up(t, own)
        p = progress.position
        log(t, f"going on from {own.path}: step {progress.step}, epoch {p.epoch}, its step {p.step_in_epoch}")
        return progress
    t.monitor.begin(0, [])
    if config.init_from is None:
        log(t, f"starting {config.name} from nothing")
        return RunState()
    other = checkpoint.newest_whole(checkpoint.find_run(config.init_from), world, lambda line: log(t, line))
    if other is None:
        raise ValueError(f"init_from: {config.init_from} has no complete checkpoint yet; train it first")
    if other.progress.step < other.state["config"]["steps"]:
        done = f"{other.progress.step} of its {other.state['config']['steps']} steps"
        log(t, f"WARNING: {config.init_from} is not finished: it has {done}")
    origins = inherit(other, t.engine, t.ema, moments=config.carry_moments)
    moments = "the optimizer's moments too" if config.carry_moments else "fresh optimizer moments"
    log(t, f"starting {config.name} from {other.path}: its weights and average, {moments}, data from the start")
    for line in [*checkpoint.changes(other.state, t.saver.about), *origins]:
        log(t, f"  {line}")
    return RunState(updates=other.progress.updates if config.carry_moments else 0)


def note(t: Trainer, step: int) -> None:
    """Notes this start; a SLURM job that does not get on is an error on all processes."""
    problem = None
    if t.engine.world.rank == 0:
        try:
            note_start(t.config.run_dir, step)
        except RuntimeError as error:
            problem = str(error)
    if problem := gather(problem, t.engine.world)[0]:
        raise RuntimeError(problem)


def take_up(t: Trainer, own: checkpoint.Checkpoint) -> RunState:
    """Puts one of the run's own checkpoints back everywhere; those of later steps are set aside."""
    checkpoint.set_aside_later(t.config.run_dir, own.progress.step, t.engine.world)
    progress = resume(own, t.engine, t.ema, t.loader.fingerprint)
    t.monitor.begin(progress.step, own.totals(t.engine.world))
    return progress


def tell_of_fault(t: Trainer, progress: RunState) -> None:
    """A skipped step in the log, and with its samples in the run's list."""
    t.guard.record(t.config.run_dir, progress.step)
    health, file = progress.health, t.config.run_dir / SKIPPED
    counted = f"{health.in_a_row} in a row, {health.skipped} in all"
    log(t, f"WARNING: step {progress.step} was skipped: {t.guard.verdict.fault} ({counted}; its samples: {file})")


def count_damaged(t: Trainer, batches: list[Batch]) -> None:
    """Shards that proved damaged on any process: new ones in the log. Raises RuntimeError beyond data.damaged_shards."""
    mine = {d.shard: d for batch in reversed(batches) for d in reversed(batch.damaged)}
    found = {shard: d for some in gather(mine, t.engine.world) for shard, d in some.items() if shard not in t.damaged}
    t.damaged.update(found)
    count, limit = len(t.damaged), t.config.data.damaged_shards
    for shard, d in sorted(found.items()):
        what = f"sample {d.sample} cannot be read ({d.reason}); others stand in"
        log(t, f"WARNING: {shard}: {what} ({count} of {limit} damaged shards)")
    if count > limit:
        raise RuntimeError(
            f"{count} shards of {t.config.data.path} are damaged, data.damaged_shards allows {limit}: "
            f"{', '.join(sorted(t.damaged))}; run data_prep/verify.py --repair on the data set"
        )


def roll_back(t: Trainer, progress: RunState) -> RunState:
    """After too many skipped steps in a row: the last good checkpoint, with other noise and another order of the data.

    Raises:
        RuntimeError: there is no such checkpoint, or it has been tried often enough.
    """
    health, limit = progress.health, t.config.guard.rollbacks
    what = f"the last {health.in_a_row} steps up to {progress.step} were skipped, the last one because {t.guard.verdict.fault}"
    where = f"Their samples and losses: {t.config.run_dir / SKIPPED}"
    if health.rollbacks >= limit:
        raise RuntimeError(
            f"{what}, after {health.rollbacks} rollbacks (guard.rollbacks is {limit}). {where}. Look at the data they name "
            "and at the loss curve, lower optimizer.lr, or start from an older checkpoint by removing the newer ones"
        )
    t.saver.wait()
    good = checkpoint.newest_whole(
        t.config.run_dir, t.engine.world, lambda line: log(t, line), lambda c: not c.progress.health.in_a_row
    )
    if good is None:
        raise RuntimeError(f"{what}, and there is no checkpoint to go back to. {where}")
    back = take_up(t, good)
    health = replace(back.health, skipped=health.skipped, rollbacks=health.rollbacks + 1)
    log(
        t,
        f"WARNING: {what}; back to {good.path} with other noise and data order ({health.rollbacks} of {limit} rollbacks)",
    )
    return replace(back, health=health)


def save(t: Trainer, progress: RunState, wait: bool) -> None:
    """Starts a checkpoint, and finishes it if `wait`: then one that fails is an error, else a warning."""
    t.watchdog.at("writing a checkpoint")
    with t.monitor.paused():
        start = time.perf_counter()
        t.saver.wait()
        if news := t.saver.news():
            log(t, news)
        t.saver.save(progress, t.monitor.sums())
        t.monitor.stood_still(progress.step, time.perf_counter() - start)
        if wait:
            t.saver.wait()
            barrier(t.engine.world)
    if wait and t.saver.error:
        raise RuntimeError(t.saver.error)


def timed(t: Trainer, progress: RunState) -> Iterator[list[Batch]]:
    """The batches from a position on; the monitor learns how long each was waited for."""
    t.loader.resume(progress.position, progress.health.rollbacks)
    batches = iter(t.loader)
    while True:
        start = time.perf_counter()
        t.watchdog.at("reading data")
        batch = next(batches)
        t.monitor.waited(time.perf_counter() - start)
        yield batch


def log(t: Trainer, line: str) -> None:
    """A line from process 0."""
    if t.engine.world.rank == 0:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
