"""A killed and restarted run equals one that was never killed, and a stage starts from the one before."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from faults import at_step
from support import SMALL, ended, fork_training, scalars, state_of

from pretrain.checkpoint.reader import newest

RETENTION = ("checkpoint.every=4", "checkpoint.keep_last=2", "checkpoint.keep_every=0")
WORDS = (*SMALL, *RETENTION, "steps=10", "model.mask_dropout=0.1")


@pytest.fixture(scope="module")
def uninterrupted(data_set: Path, train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train("demo_256", *WORDS, f"data.path={data_set}", f"run_dir={run_dir}")
    return run_dir


def test_kill_9_and_restart_is_bitwise_uninterrupted(
    data_set: Path, uninterrupted: Path, train, tmp_path: Path
) -> None:
    """Killed in the second epoch (5 steps each), two steps after its checkpoint: same samples, noise, moments and curve."""
    words, log = [*WORDS, f"data.path={data_set}", f"run_dir={tmp_path / 'run'}"], tmp_path / "log"
    (process,) = fork_training(log, "demo_256", *words, before=partial(at_step, 6, 0, "SIGKILL"))
    assert ended([process]) == [-signal.SIGKILL], log.read_text()
    assert newest(tmp_path / "run").run_state.step == 4  # type: ignore[union-attr]
    finished = train("demo_256", *words)
    assert "going on from" in finished.output
    assert "step 4, epoch 0, its step 4" in finished.output
    expected = state_of(uninterrupted)
    for name, value in state_of(tmp_path / "run").items():
        assert torch.equal(value, expected[name]), name
    assert scalars(tmp_path / "run", "train/loss") == scalars(uninterrupted, "train/loss")


def test_a_finished_run_is_left_alone(uninterrupted: Path, data_set: Path, train) -> None:
    before = (uninterrupted / "checkpoints" / "step_00000010" / "state.json").stat().st_mtime_ns
    finished = train("demo_256", *WORDS, f"data.path={data_set}", f"run_dir={uninterrupted}")
    assert "is complete: 10 steps, 40 images" in finished.output
    assert (uninterrupted / "checkpoints" / "step_00000010" / "state.json").stat().st_mtime_ns == before


def test_retention(uninterrupted: Path) -> None:
    names = sorted(p.name for p in (uninterrupted / "checkpoints").iterdir())
    assert names == ["latest", "step_00000008", "step_00000010"]


def test_stage_2_starts_from_stage_1(data_set: Path, uninterrupted: Path, train, tmp_path: Path) -> None:
    """Weights and average are taken over, the data starts anew, and moments only if asked for."""
    words = [*SMALL, f"data.path={data_set}", f"init_from={uninterrupted}", "optimizer.lr=1e-30", "steps=2"]
    expected = state_of(uninterrupted)
    for carry in ("false", "true"):
        run_dir = tmp_path / carry
        finished = train("demo_512", *words, f"carry_moments={carry}", f"run_dir={run_dir}")
        assert "its weights and average" in finished.output
        assert "  data.resolution: 256 → 512\n" in finished.output
        assert "  model.position_scale: None → 2.0\n" in finished.output
        found = newest(run_dir)
        assert found is not None
        assert found.run_state.position.step_in_epoch == 2
        assert found.run_state.updates == (12 if carry == "true" else 2)
        for name, value in found.parameters("master").items():
            # A learning rate of nothing keeps the weights.
            torch.testing.assert_close(value, expected[f"master/{name}"], rtol=0, atol=1e-12)


def test_refusals(data_set: Path, uninterrupted: Path, train, tmp_path: Path) -> None:
    """Another data order, another model, and a run that is not there: one clear line each."""
    same = [*WORDS, f"data.path={data_set}", f"run_dir={uninterrupted}", "steps=12"]
    assert "another data order" in train("demo_256", *same, "seed=1", check=False).output
    fresh = [*WORDS, f"data.path={data_set}", f"run_dir={tmp_path / 'fresh'}"]
    other = train("demo_256", *fresh, f"init_from={uninterrupted}", "model.ffn=uniform", check=False)
    assert "is of another model" in other.output
    assert "Traceback" not in other.output
    assert "no run at nowhere" in train("demo_256", *fresh, "init_from=nowhere", check=False).output
