"""Token routing in whole trainings of real processes: killed and resumed across `until`, and on another number of processes."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest
from faults import at_step
from support import SMALL, end_with_the_first, fork_training, same_state, scalars

WORDS = (
    *SMALL,
    "steps=8",
    "model.mask_dropout=0.1",
    "checkpoint.every=3",
    "deepspeed.train_micro_batch_size_per_gpu=1",
    "routing.until=0.5",
)
BLOCKS = {
    "tread": ["routing.first=1", "routing.last=2"],
    "sprint": ["model.fusion=[1,2]"],
    "deferred_masking": ["routing.first=1"],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_killed_and_resumed_across_until_it_is_bitwise_uninterrupted(
    name: str, data_set: Path, train, tmp_path: Path
) -> None:
    """Steps 1 to 4 are routed; the checkpoint is of step 3, the kill after step 6. One process computes the same losses."""
    words = [*WORDS, f"routing.name={name}", *BLOCKS[name], f"data.path={data_set}"]
    straight, run, alone = (tmp_path / folder for folder in ("straight", "run", "alone"))
    train("demo_256", *words, f"run_dir={straight}", processes=2)
    log, kill = tmp_path / "log", partial(at_step, 5, 0, "SIGKILL")
    processes = fork_training(log, "demo_256", *words, f"run_dir={run}", processes=2, before=kill)
    assert -signal.SIGKILL in end_with_the_first(processes), log.read_text()
    assert "step 3, epoch 0" in train("demo_256", *words, f"run_dir={run}", processes=2).output
    assert same_state(run, straight)
    assert scalars(run, "train/loss") == scalars(straight, "train/loss")

    train("demo_256", *words, f"run_dir={alone}", "deepspeed.train_micro_batch_size_per_gpu=4")
    assert scalars(alone, "train/loss") == pytest.approx(scalars(straight, "train/loss"), rel=1e-4)
