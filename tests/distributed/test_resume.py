"""A killed and restarted run equals one that was never killed, and a stage starts from the one before."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from faults import at_step
from support import SMALL, ended, fork_training, same_state, scalars, state_of, wait_for_line

from pretrain.checkpoint.reader import newest
from pretrain.distributed.launcher import TORCH
from pretrain.train import main

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
        assert "  model.position_scale: 0.25 → 0.5\n" in finished.output
        found = newest(run_dir)
        assert found is not None
        assert found.run_state.position.step_in_epoch == 2
        assert found.run_state.updates == (12 if carry == "true" else 2)
        for name, value in found.parameters("master").items():
            # A learning rate of nothing keeps the weights.
            torch.testing.assert_close(value, expected[f"master/{name}"], rtol=0, atol=1e-12)


def test_what_may_change_is_listed_and_what_the_weights_mean_may_not(
    data_set: Path, uninterrupted: Path, train, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    words = [*WORDS, f"data.path={data_set}", f"run_dir={run}"]
    meaning = ["objective.name=epsilon", "model.position_scale=2", "steps=9"]
    refused = train("demo_256", *words, *meaning, check=False)
    assert refused.codes == [1]
    told = [line.strip() for line in refused.output.splitlines()]
    assert "model.position_scale: there 0.25, here 2.0" in told
    assert "objective.name: there flow, here epsilon" in told
    assert f"problem  steps: 9 lies behind step 10, which {run} has done; give more steps, or another run_dir" in told
    assert same_state(run, uninterrupted)

    changes = ["steps=11", "optimizer.lr=1e-5", "deepspeed.gradient_clipping=0.5"]
    changed = train("demo_256", *words, *changes)
    for line in ("steps: 10 → 11", "optimizer.lr: 0.0025 → 1e-05", "deepspeed.gradient_clipping: 1.0 → 0.5"):
        assert f"\n  {line}\n" in changed.output, changed.output
    # Left off, an override is gone, and that is said.
    back = train("demo_256", *words, "steps=12")
    assert "\n  optimizer.lr: 1e-05 → 0.0025\n" in back.output
    assert "is complete: 12 steps" in back.output


def test_a_second_training_in_one_run_directory_is_refused(data_set: Path, train, tmp_path: Path) -> None:
    """The same job submitted twice."""
    words, log = [*WORDS, f"data.path={data_set}", f"run_dir={tmp_path / 'run'}"], tmp_path / "log"
    (first,) = fork_training(log, "demo_256", *words, before=partial(at_step, 2, 0, "SIGSTOP"))
    try:
        wait_for_line(log, "step 2/")
        second = train("demo_256", *words, check=False)
        assert second.codes == [1]
        assert (
            f"run is in use by the training of {socket.gethostname()} (process {first.pid}), which started"
            in second.output
        )
        os.kill(first.pid, signal.SIGCONT)  # type: ignore[arg-type]
        assert ended([first]) == [0], log.read_text()
    finally:
        first.kill()
        first.join()


def test_refusals(data_set: Path, uninterrupted: Path, train, tmp_path: Path) -> None:
    """Another data order, another model, and a run that is not there: one clear line each."""
    same = [*WORDS, f"data.path={data_set}", f"run_dir={uninterrupted}", "steps=12"]
    held_out = ["data.validation=0.4", "data.validation_samples=8"]  # by its name, one of the two tars
    refused = train("demo_256", *same, "seed=1", check=False).output
    assert "another data order" in refused and "  seed: there 0, now 1\n" in refused
    refused = train("demo_256", *same, *held_out, check=False).output
    assert "another data order" in refused and "  held_out: there None, now {'images/256': " in refused
    fresh = [*WORDS, f"data.path={data_set}", f"run_dir={tmp_path / 'fresh'}"]
    other = train("demo_256", *fresh, f"init_from={uninterrupted}", "model.ffn=uniform", check=False)
    assert "is of another model" in other.output
    assert "Traceback" not in other.output
    assert "no run at nowhere" in train("demo_256", *fresh, "init_from=nowhere", check=False).output
    assert not (tmp_path / "fresh").exists()  # a refused start leaves nothing behind


@pytest.mark.parametrize("start", ["nowhere", "another model"])
def test_a_check_looks_at_what_a_start_begins_with(
    start: str, data_set: Path, uninterrupted: Path, monkeypatch, capsys, tmp_path: Path
) -> None:
    """On a login node, by `--check`: what would end the start is a problem there, with the settings that differ."""
    for name in (*TORCH, "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    init = f"init_from={uninterrupted if start == 'another model' else tmp_path / 'nowhere'}"
    words = [*WORDS, f"data.path={data_set}", f"run_dir={tmp_path / 'fresh'}", init, "model.ffn=tapered"]
    assert main(["demo_256", *words, "--check"]) == 1
    said = capsys.readouterr().out
    assert "demo_256: 1 problem\n" in said
    if start == "nowhere":
        assert f"  problem  init_from: no run at {tmp_path / 'nowhere'}" in said
    else:
        assert " is of another model:\n" in said
        assert "             model.ffn: there shared, here tapered\n" in said
        assert "more" not in said
    assert not (tmp_path / "fresh").exists()
