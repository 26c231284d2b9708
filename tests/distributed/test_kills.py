"""Killed at any instant, on any number of processes: what comes out equals what an undisturbed run gives."""

from __future__ import annotations

import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from faults import PLACES, at_step, die_in_publishing, record_keys, several
from support import SMALL, end_with_the_first, fork_training, same_state, scalars

from pretrain.resilience.signals import REQUEUE

RETENTION = ("checkpoint.every=3", "checkpoint.keep_last=2", "checkpoint.keep_every=0")
KILLS = 25


def test_25_kills_leave_no_trace(data_set: Path, train, tmp_path: Path) -> None:
    """Of one rank or all: in steps, while a checkpoint is written, in its renaming. Bitwise, and each point of the curve once."""
    words = [*SMALL, *RETENTION, "steps=60", "model.mask_dropout=0.1", "logging.every=2", f"data.path={data_set}"]
    straight, run_dir, log = tmp_path / "straight", tmp_path / "killed", tmp_path / "log"
    train("demo_256", *words, f"run_dir={straight}", processes=2)
    rng = random.Random(4)
    places = [*PLACES, *PLACES, *[None] * (KILLS - 2 * len(PLACES))]
    rng.shuffle(places)
    for place in places:
        before = partial(die_in_publishing, place, rng.choice([1, 1, 2])) if place else None
        started = fork_training(log, "demo_256", *words, f"run_dir={run_dir}", processes=2, before=before)
        victims = rng.choice([started, started[:1], started[1:]])
        if place is None:
            lines = log.read_text().count("step ") if log.exists() else 0
            wait_for_lines(log, lines + 2)
            time.sleep(rng.uniform(0, 0.4))
            for process in victims:
                process.kill()
        assert -signal.SIGKILL in end_with_the_first(started), log.read_text()[-3000:]
    finished = train("demo_256", *words, f"run_dir={run_dir}", processes=2)
    assert "is complete: 60 steps, 240 images" in finished.output
    assert same_state(run_dir, straight)
    for tag in ("train/loss", "train/gradient_norm", "loss_by_timestep/0400_to_0600", "mask_mean/block_01"):
        assert scalars(run_dir, tag) == scalars(straight, tag), tag
    names = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert names == ["latest", "step_00000057", "step_00000060"]


def test_other_numbers_of_processes_repeat_and_lose_no_sample(data_set: Path, train, tmp_path: Path) -> None:
    """1 → 2 → 4 → 2 processes over two epochs of 5 steps, the mask's dropout included."""
    words = [*SMALL, "deepspeed.train_micro_batch_size_per_gpu=1", "steps=10", "optimizer.lr=1e-4"]
    words += ["model.mask_dropout=0.1", f"data.path={data_set}", "logging.every=3"]
    for until, processes in ((2, 1), (4, 2), (7, 4), (10, 2)):
        record, stop = partial(record_keys, tmp_path), partial(at_step, until - 1, 0, "SIGUSR1")
        before = partial(several, record, stop) if until < 10 else record
        run = train("demo_256", *words, f"run_dir={tmp_path / 'run'}", processes=processes, before=before, check=False)
        assert set(run.codes) == {REQUEUE if until < 10 else 0}, run.output
    seen: dict[int, list[str]] = {0: [], 1: []}
    for path in sorted(tmp_path.glob("[01]_*")):
        for line in path.read_text().splitlines():
            seen[int(path.name[0])] += line.split()[1:]
    assert [len(keys) for keys in seen.values()] == [20, 20]
    assert set(seen[0]) == set(seen[1]) and len(set(seen[0])) == 20
    train("demo_256", *words, f"run_dir={tmp_path / 'straight'}")
    losses, straight = (scalars(tmp_path / name, "train/loss") for name in ("run", "straight"))
    assert list(losses) == [3, 6, 9, 10]
    assert losses == pytest.approx(straight, rel=1e-4)


def wait_for_lines(log: Path, count: int, seconds: float = 300) -> None:
    """Until the log tells of so many steps."""
    deadline = time.monotonic() + seconds
    while not log.exists() or log.read_text().count("step ") < count:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
