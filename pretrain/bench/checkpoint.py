"""The cost of safety: how long training stands still for a checkpoint, written at once and in the background; its bytes a
parameter; the share of a step that the spike guard, the watchdog and the logging take.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_prep.encoders import DOWNSAMPLE
from pretrain import training
from pretrain.bench.made import made_batch, made_trainer
from pretrain.bench.timing import model_arguments, side_by_side
from pretrain.checkpoint.reader import FOLDER
from pretrain.config import Config, load
from pretrain.data.batch import Batch
from pretrain.diffusion import Loss
from pretrain.distributed.rendezvous import init_distributed, shutdown
from pretrain.distributed.world import World
from pretrain.models import ComputeBudget, preset
from pretrain.resilience.heartbeat import IN_STEP
from pretrain.resilience.signals import StopRequest
from pretrain.state import RunState

CAPTION = 40  # tokens


def arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser, preset="focusdit_1b", batch=2, rounds=5)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; by default a temporary folder")


def run(args: argparse.Namespace) -> str:
    """The table."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        world, stop = init_distributed(), StopRequest()
        try:
            t = made_trainer(*_settings(args, folder, world), world, stop)
            batch = made_batch(t.config, [CAPTION] * args.batch)
            lines = _checkpoints(t, batch, args.rounds) + _share(t, batch, args.rounds)
            t.watchdog.close()
        finally:
            stop.close()
            shutdown()
    return "\n".join(lines)


def _settings(args: argparse.Namespace, folder: str, world: World) -> tuple[Config, dict[str, Any]]:
    backbone = preset(args.preset)
    words = {
        "run_dir": folder,
        "preview.every": 0,
        "steps": 1000000,
        "logging.every": 20,
        "optimizer.name": "adamw",
        "optimizer.ema_decay": 0.9999,
        "model.preset": args.preset,
        "model.depth": args.depth or backbone.depth,
        "data.resolution": args.tokens_per_side * backbone.patch * DOWNSAMPLE,
        "deepspeed.train_batch_size": args.batch * world.size,
        "deepspeed.train_micro_batch_size_per_gpu": args.batch,
        "deepspeed.bf16.enabled": str(world.device.type == "cuda").lower(),
    }
    return load("demo_256", [f"{key}={value}" for key, value in words.items()])


def _checkpoints(t: training.Trainer, batch: Batch, rounds: int) -> list[str]:
    """Training stands still for the copy or the whole writing; steps beside the writing may be slower, too."""
    progress, alone, beside = RunState(), [], []
    still: dict[bool, list[float]] = {True: [], False: []}
    for i in range(rounds + 1):  # the first round does not count: buffers are made in it
        for background in (False, True):
            start = time.perf_counter()
            progress = training.train_step(t, [batch], progress)
            step = time.perf_counter() - start
            t.saver.settings = t.config.checkpoint.model_copy(
                update={"background": background, "keep_last": 1, "keep_every": 0}
            )
            start = time.perf_counter()
            t.saver.save(progress, t.monitor.pending_sums())
            if i:
                alone.append(step)
                still[background].append(time.perf_counter() - start)
            while background and t.saver.report() is None:
                start = time.perf_counter()
                progress = training.train_step(t, [batch], progress)
                if i:
                    beside.append(time.perf_counter() - start)
            if t.saver.error:
                raise OSError(t.saver.error)
    (newest,) = (t.config.run_dir / FOLDER).glob("step_*")
    count = sum(p.numel() for p in t.model.parameters())
    size = sum(p.stat().st_size for p in newest.iterdir())
    at_once, behind = statistics.median(still[False]), statistics.median(still[True])
    bytes_each, ms_alone, ms_beside = size / count, 1e3 * statistics.median(alone), 1e3 * statistics.median(beside)
    about = f"{count / 1e6:.1f}M parameters in one process, {size / 1e9:.2f} GB on disk"
    return [
        f"{about}: {bytes_each:.2f} bytes a parameter ({bytes_each / 14:.2f} × 14)",
        f"  written at once     training stands still for {at_once:7.3f} s",
        f"  in the background   training stands still for {behind:7.3f} s   ratio {behind / at_once:.3f}",
        f"  a step beside the writing {ms_beside:.1f} ms, alone {ms_alone:.1f} ms   ratio {ms_beside / ms_alone:.2f}",
    ]


def _share(t: training.Trainer, batch: Batch, rounds: int) -> list[str]:
    """The guard, the watchdog's notes and the monitor by themselves, 20 steps with one logging step, against a step."""
    zeros = torch.zeros(len(batch.keys), device=t.engine.world.device)
    loss = Loss(zeros.mean() + 1, zeros + 1, zeros + 500)
    masks = torch.zeros(3, t.model.config.depth, len(batch.keys), device=zeros.device)
    squares = torch.ones((), dtype=torch.float64, device=zeros.device)
    progress = [RunState(step=1)]

    def safety() -> None:
        """The work of guard, watchdog and monitor in 20 steps."""
        for _ in range(20):
            before = progress[0]
            t.watchdog.begin("reading data")
            t.watchdog.begin(IN_STEP)
            t.guard.begin(before.history)
            t.monitor.record(batch, loss, masks, ComputeBudget())
            t.guard.add(batch.keys, loss)
            t.guard.judge(squares)
            t.watchdog.finish_step(before.step + 1)
            t.monitor.step(before.step + 1, t.guard.verdict, 1e-4)
            history = before.history.after(t.guard.verdict, t.config.guard.window)
            progress[0] = replace(before, step=before.step + 1, history=history)

    def step() -> None:
        training.train_step(t, [batch], RunState(step=1))

    runs: dict[str, Callable[[], object]] = {"safety": safety, "step": step}
    with closing(t.monitor):
        took = side_by_side(runs, rounds, t.engine.world.device)
    each = took["safety"] / 20
    share = f"{1e3 * each:.3f} ms of a step of {1e3 * took['step']:.1f} ms: {each / took['step']:.2%}"
    return [f"  spike guard, watchdog and logging (a line each 20 steps) {share}"]
