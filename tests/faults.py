"""Faults for training processes: what each does is arranged in the process itself, by `fork_training(before=…)`.

The moment of a kill is chosen here, where no outside killer could meet it; the kill itself is a real SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch


def is_rank(rank: int) -> bool:
    return os.environ["RANK"] == str(rank)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def several(*faults: Callable[[], None]) -> None:
    for fault in faults:
        fault()


def record_keys(folder: Path) -> None:
    """Each process appends the keys of every step that it takes, a line a step."""
    from pretrain import training

    whole = training.train_step

    def step(t, batches, progress):
        keys = " ".join(key for batch in batches for key in batch.keys)
        with (folder / f"{t.loader.position.epoch}_{os.environ['RANK']}").open("a") as file:
            file.write(f"{progress.step + 1} {keys}\n")
        return whole(t, batches, progress)

    training.train_step = step


def die_in_publishing(place: str, count: int) -> None:
    """Process 0 is killed at one place of the `count`-th checkpoint of this start."""
    if not is_rank(0):
        return
    from pretrain.checkpoint import writer

    seen = 0

    def dying(function, before: bool, when=lambda *_: True):
        def call(*args, **kwargs):
            nonlocal seen
            if not when(*args):
                return function(*args, **kwargs)
            seen += 1
            if seen == count and before:
                die()
            result = function(*args, **kwargs)
            if seen == count:
                die()
            return result

        return call

    if place == "before the file":
        writer.save_file = dying(writer.save_file, before=True)
    elif place == "after the file":
        writer.save_file = dying(writer.save_file, before=False)
    elif place == "before the rename":
        writer.publish = dying(writer.publish, before=True)
    elif place == "after the rename":  # `latest` still names the one before
        writer.atomic_write = dying(writer.atomic_write, before=True, when=lambda path, _: path.name == "latest")
    elif place == "before retention":
        writer.remove_old = dying(writer.remove_old, before=True)
    elif place == "while one is removed":
        shutil.rmtree = dying(shutil.rmtree, before=False, when=lambda path, *_: Path(path).name.startswith("step_"))
    else:
        raise ValueError(place)


PLACES = (
    "before the file",
    "after the file",
    "before the rename",
    "after the rename",
    "before retention",
    "while one is removed",
)


def die_in_sampling(count: int, argv: list[str]) -> int:
    """`pretrain.sample`, killed when it is about to write its `count`-th picture."""
    from pretrain import sample
    from pretrain.sampling import drawing

    whole, seen = drawing.write_png, 0

    def dying(*args, **kwargs):
        nonlocal seen
        seen += 1
        if seen == count:
            die()
        return whole(*args, **kwargs)

    drawing.write_png = dying
    return sample.main(argv)


def bad_losses(steps: dict[int, float], rank: int = 0, times: int = 1_000) -> None:
    """At these steps (from 1) one process's loss is multiplied by a factor, nan or one that makes a spike; so many times."""
    if not is_rank(rank):
        return
    from dataclasses import replace

    from pretrain import training
    from pretrain.loss import TrainingLoss

    whole, compute, now, left = training.train_step, TrainingLoss.compute, 0, times

    def step(t, batches, progress):
        nonlocal now, left
        now = progress.step + 1
        left -= now in steps
        return whole(t, batches, progress)

    def bad(*given):
        loss, factor = compute(*given), steps.get(now, 1.0) if left >= 0 else 1.0
        return replace(loss, mean=loss.mean * factor, per_sample_B=loss.per_sample_B * torch.tensor(factor))

    training.train_step, TrainingLoss.compute = step, bad  # type: ignore[method-assign]


def at_step(step: int, rank: int, what: str) -> None:
    """Once one process has done `step` steps, it sends itself a signal, sleeps in reading, raises an error, or fills a disk.

    `what` is a signal's name, sleep, error, or the folder to be filled.
    """
    if not is_rank(rank):
        return
    from pretrain import training

    whole = training.train_step

    def faulty(t, batches, progress):
        if progress.step == step:
            if what == "error":
                raise ValueError("a fault of its own")
            if what == "sleep":
                t.watchdog.begin("reading data")
                print("asleep", flush=True)
                time.sleep(600)
            if what.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, what))
            if what.startswith("/"):
                t.saver.wait()
                with contextlib.suppress(OSError), (Path(what) / "somebody_elses").open("wb", 0) as file:
                    while True:
                        file.write(bytes(2**20))
        return whole(t, batches, progress)

    training.train_step = faulty
