"""Muon in whole trainings of real processes: whole matrices over cut partitions, kills, other numbers of processes, refusals."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest
from faults import at_step
from support import SMALL, end_with_the_first, fork_training, same_state, scalars, state_of

from pretrain.checkpoint.reader import newest
from pretrain.resilience.signals import REQUEUE

WORDS = (
    *SMALL,
    "optimizer.name=muon",
    "optimizer.lr=1e-3",
    "steps=8",
    "model.mask_dropout=0.1",
    "checkpoint.every=3",
    "deepspeed.train_micro_batch_size_per_gpu=1",
)


@pytest.fixture(scope="module")
def straight(data_set: Path, train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two processes."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    train("demo_256", *WORDS, f"data.path={data_set}", f"run_dir={run_dir}", processes=2)
    return run_dir


def test_killed_and_gone_on_is_bitwise_uninterrupted(straight: Path, data_set: Path, train, tmp_path: Path) -> None:
    words, log = [*WORDS, f"data.path={data_set}", f"run_dir={tmp_path / 'run'}"], tmp_path / "log"
    kill = partial(at_step, 5, 0, "SIGKILL")
    processes = fork_training(log, "demo_256", *words, processes=2, before=kill)
    assert -signal.SIGKILL in end_with_the_first(processes), log.read_text()
    assert "step 3, epoch 0" in train("demo_256", *words, processes=2).output
    assert same_state(tmp_path / "run", straight)
    assert scalars(tmp_path / "run", "train/loss") == scalars(straight, "train/loss")


def test_other_numbers_of_processes_repeat_it(straight: Path, data_set: Path, train, tmp_path: Path) -> None:
    """1 → 2 → 4 → 2: the partitions' ends cut other matrices each time."""
    words = [*WORDS, f"data.path={data_set}", f"run_dir={tmp_path / 'run'}"]
    for until, processes in ((2, 1), (4, 2), (6, 4), (8, 2)):
        stop = partial(at_step, until - 1, 0, "SIGUSR1") if until < 8 else None
        run = train("demo_256", *words, processes=processes, before=stop, check=False)
        assert set(run.codes) == {REQUEUE if until < 8 else 0}, run.output
    losses, expected = (scalars(run_dir, "train/loss") for run_dir in (tmp_path / "run", straight))
    assert list(losses) == list(range(1, 9))
    assert losses == pytest.approx(expected, rel=1e-3)
    ones, others = state_of(tmp_path / "run"), state_of(straight)
    assert ones.keys() == others.keys() and "exp_avg_sq/blocks.0.ffn.key.weight" not in ones
    # They begin at 0: what they are is what the steps did.
    for name in (n for n in ones if n.startswith("master/") and n.endswith("ffn.value.weight")):
        assert (ones[name] - others[name]).norm() < 0.02 * others[name].norm(), name


def test_another_optimizer_goes_on_from_weights_alone(straight: Path, data_set: Path, train, tmp_path: Path) -> None:
    words = [*WORDS, f"data.path={data_set}", "optimizer.name=adamw", "steps=9"]
    refused = train("demo_256", *words, f"run_dir={straight}", check=False)
    assert refused.codes == [1]
    assert (
        "holds another optimizer's moments; undo the change, or start another run_dir with init_from" in refused.output
    )
    assert "optimizer.name: there muon, here adamw" in refused.output
    fresh = [f"init_from={straight}", f"run_dir={tmp_path / 'fresh'}"]
    carried = train("demo_256", *words, *fresh, "carry_moments=true", check=False)
    assert carried.codes == [1] and "leave carry_moments out: optimizer.name: there muon, here adamw" in carried.output
    started = train("demo_256", *words, *fresh)
    assert "\n  optimizer.name: muon → adamw\n" in started.output
    assert newest(tmp_path / "fresh").run_state.step == 9  # type: ignore[union-attr]


def test_moments_are_carried(straight: Path, data_set: Path, train, tmp_path: Path) -> None:
    words = [
        *WORDS,
        f"data.path={data_set}",
        f"init_from={straight}",
        "carry_moments=true",
        f"run_dir={tmp_path / 'run'}",
    ]
    train(
        "demo_512", *words, "optimizer.lr=1e-30", "optimizer.momentum=0.999999", "steps=2", "optimizer.warmup_steps=0"
    )
    found, there = state_of(tmp_path / "run"), state_of(straight)
    name = "exp_avg/blocks.0.ffn.key.weight"
    assert there[name].norm() > 0
    assert (found[name] - there[name]).norm() < 1e-2 * there[name].norm()
