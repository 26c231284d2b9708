"""Training: python -m pretrain.train CONFIG [section.key=value ...]

Runs under any launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT (torchrun,
slurm/*.sh), or alone as one process. Started again, it goes on at the exact next sample of its newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from omegaconf import OmegaConf

from data_prep.files import write_whole
from data_prep.shards import CARD, NULL_TEXT
from pretrain import checkpoint, engine, optim, preflight
from pretrain.checkpoint import Progress
from pretrain.config import Config, geometry, load
from pretrain.console import quiet
from pretrain.data import Batch, Loader, sample_seed
from pretrain.diffusion import Objective, draw, measure
from pretrain.ema import Ema
from pretrain.engine import Engine, World
from pretrain.models import DiT
from pretrain.monitor import Monitor
from pretrain.preview import Preview
from pretrain.starts import note_start


@dataclass(frozen=True)
class Trainer:
    """The parts of a training step."""

    config: Config
    engine: Engine
    ema: Ema
    objective: Objective
    monitor: Monitor


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trains a stage; every field of a config can be overridden.")
    parser.add_argument("config", help="a stage's name, or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value, or deepspeed.key=value")
    parser.add_argument("--check", action="store_true", help="look at all that the training needs, and do not train")
    parser.add_argument("--processes", type=int, help="with --check on a login node: the processes it is planned for")
    args = parser.parse_intermixed_args(argv)
    quiet()
    try:
        if args.check:
            return preflight.check(args.config, args.overrides, args.processes)
        config, deepspeed = load(args.config, args.overrides)
        world = engine.start()
        preflight.require(config, deepspeed, world)
        train(config, deepspeed, world)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("FOCUSDIT_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"train: process {rank}: {error}" if rank != "0" else f"train: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        engine.stop()
    return 0


def train(config: Config, deepspeed: dict[str, Any], world: World) -> None:
    """Wires the parts in the order of the data, and runs to the last step."""
    accumulation = geometry(deepspeed, world.size)
    deepspeed = {**deepspeed, "gradient_accumulation_steps": accumulation}
    backbone = config.model.backbone()
    loader = Loader(
        config,
        backbone,
        deepspeed["train_batch_size"],
        deepspeed["train_micro_batch_size_per_gpu"],
        world.rank,
        world.size,
    )
    keep_what_is_used(config, deepspeed, loader, world)
    preview = Preview(config, loader.card, world)
    torch.manual_seed(config.seed)
    model = DiT(backbone).to(world.device)
    model.recompute = config.model.recompute
    if config.model.compile:
        for block in model.blocks:
            block.compile()
    zero = Engine(model, optim.build(model, config.optimizer), deepspeed, world)
    ema = Ema(zero, config.optimizer.ema_decay)
    progress = begin(config, zero, ema, loader)
    if world.rank == 0:
        note_start(config.run_dir, progress.step)
    monitor = Monitor(config, backbone, zero, progress.step)
    trainer = Trainer(config, zero, ema, config.objective.build(), monitor)
    about = {"data": loader.fingerprint, "config": config.model_dump(mode="json")}
    batches = timed(iter(loader), monitor)
    while progress.step < config.steps:
        progress = replace(train_step(trainer, next(batches), progress), position=loader.position)
        if preview.due(progress.step):
            with monitor.paused():
                preview.draw(model, ema, monitor, progress.step)
        if progress.step % config.checkpoint.every == 0 or progress.step == config.steps:
            with monitor.paused():
                path = checkpoint.save(config.run_dir, zero, ema, progress, about, config.checkpoint)
            log(world, f"checkpoint {path}")
    monitor.close()
    log(world, f"{config.name} is complete: {progress.step} steps, {progress.images} images; {config.run_dir}")


def train_step(trainer: Trainer, batches: list[Batch], progress: Progress) -> Progress:
    """One optimizer step over this process's micro-batches."""
    config, zero = trainer.config, trainer.engine
    lr = optim.learning_rate(progress.step, config.steps, config.optimizer)
    for i, host_batch in enumerate(batches):
        batch = host_batch.to(zero.world.device, zero.dtype)
        # Dropout follows from the step, so that a resumed run needs no random state.
        torch.manual_seed(sample_seed(config.seed, progress.step, f"{zero.world.rank}/{i}"))
        numbers = draw(batch.seeds, batch.mean_BCHW.shape, zero.world.device)
        noisy = trainer.objective.corrupt(batch.latent(numbers.posterior_BCHW), numbers.noise_BCHW, numbers.uniform_B)
        prediction = zero.forward(noisy.noisy_BCHW.to(zero.dtype), noisy.timestep_B, batch.text)
        loss = measure(prediction.sample_BCHW, noisy)
        trainer.monitor.record(batch, loss, prediction.masks_KBN)
        zero.backward(loss.mean)
        zero.step(lr)
    if zero.applied:
        trainer.ema.update(progress.updates)
    step, images = progress.step + 1, zero.world.size * sum(len(b.keys) for b in batches)
    trainer.monitor.step(step, zero, lr)
    return replace(progress, step=step, updates=progress.updates + zero.applied, images=progress.images + images)


def begin(config: Config, zero: Engine, ema: Ema, loader: Loader) -> Progress:
    """From the run's own newest checkpoint, else from another run's weights, else from nothing."""
    world = zero.world
    if own := checkpoint.newest(config.run_dir):
        progress = checkpoint.resume(own, zero, ema, loader.fingerprint)
        loader.resume(progress.position)
        p = progress.position
        log(world, f"going on from {own.path}: step {progress.step}, epoch {p.epoch}, its step {p.step_in_epoch}")
        return progress
    if config.init_from is None:
        log(world, f"starting {config.name} from nothing")
        return Progress()
    other = checkpoint.newest(checkpoint.find_run(config.init_from))
    if other is None:
        raise ValueError(f"init_from: {config.init_from} has no complete checkpoint yet; train it first")
    other.verify()
    checkpoint.take_over(other, zero, ema, moments=config.carry_moments)
    moments = "the optimizer's moments too" if config.carry_moments else "fresh optimizer moments"
    log(world, f"starting {config.name} from {other.path}: its weights and average, {moments}, data from the start")
    return Progress(updates=other.progress.updates if config.carry_moments else 0)


def timed(batches: Iterator[list[Batch]], monitor: Monitor) -> Iterator[list[Batch]]:
    """The same batches; the monitor learns how long each was waited for."""
    while True:
        start = time.perf_counter()
        batch = next(batches)
        monitor.waited(time.perf_counter() - start)
        yield batch


def keep_what_is_used(config: Config, deepspeed: dict[str, Any], loader: Loader, world: World) -> None:
    """Writes the resolved config, DeepSpeed's, the environment and the data set's card into the run directory."""
    if world.rank == 0:
        run = config.run_dir
        run.mkdir(parents=True, exist_ok=True)
        write_whole(run / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))
        write_whole(run / "ds_config.json", json.dumps(deepspeed, indent=2) + "\n")
        write_whole(run / "environment.json", json.dumps(environment(world), indent=2) + "\n")
        for name in (CARD, NULL_TEXT):
            shutil.copyfile(loader.root / name, run / name)
    if world.size > 1:
        torch.distributed.barrier()


def environment(world: World) -> dict[str, Any]:
    """Where and with what a run was started."""
    packages = ("torch", "deepspeed", "mosaicml-streaming", "transformers", "diffusers")
    return {
        "argv": sys.argv,
        "git_revision": _git("rev-parse", "HEAD"),
        "git_dirty_diff": _git("diff", "HEAD"),
        "versions": {p: version(p) for p in packages} | {"python": sys.version.split()[0]},
        "processes": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "slurm": {k: v for k, v in os.environ.items() if k.startswith("SLURM_JOB")},
    }


def _git(*words: str) -> str | None:
    """What git says of this code; None outside a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def log(world: World, line: str) -> None:
    """A line from process 0."""
    if world.rank == 0:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
