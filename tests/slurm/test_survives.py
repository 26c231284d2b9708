"""Real training on a real two-node cluster that is stopped, loses a node, is requeued, or cannot get on."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path

import pytest
from support import ROOT, SMALL, scalars

from pretrain.checkpoint.reader import newest

pytestmark = pytest.mark.slurm

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0")


def wait_for_step(run_dir: Path, job: str, cluster, beyond: int, seconds: float = 300) -> None:
    """Until the job has a checkpoint of a later step."""
    deadline = time.monotonic() + seconds
    while not (found := newest(run_dir)) or found.run_state.step <= beyond:
        assert time.monotonic() < deadline, cluster.show(job)
        time.sleep(0.2)


def test_a_training_outlives_a_signal_a_lost_node_and_a_requeue(cluster, data_set: Path, tmp_path: Path) -> None:
    """One job, `scancel --signal=USR1`, a killed slurmd, `scontrol requeue`: it comes back each time, and finishes."""
    run_dir = tmp_path / "run"
    words = [*SMALL, f"data.path={data_set}", "steps=200", "checkpoint.every=5", "checkpoint.keep_every=0"]
    environment = {
        "CONFIG": "demo_256",
        "OVERRIDES": " ".join(words),
        "RUN_DIR": str(run_dir),
        "PYTHON": sys.executable,
    }
    job = cluster.sbatch("slurm/stage1_256.sh", *TWO_NODES, env=environment)
    reached = []

    def reach_more() -> None:
        wait_for_step(run_dir, job, cluster, reached[-1] + 5 if reached else 0)
        reached.append(newest(run_dir).run_state.step)  # type: ignore[union-attr]

    reach_more()
    cluster.command("scancel", "--signal=USR1", job)
    cluster.start_requeued(job)
    assert newest(run_dir).run_state.step >= reached[-1]  # type: ignore[union-attr]
    reach_more()
    cluster.kill_node("n2")
    deadline = time.monotonic() + 300
    while cluster.show(job)[0]["Restarts"] != "2":
        assert time.monotonic() < deadline, cluster.show(job)
        time.sleep(0.5)
    cluster.start_node("n2")
    cluster.start_requeued(job, restarts=2)
    reach_more()
    cluster.command("scontrol", "requeue", job)
    cluster.start_requeued(job, restarts=3)
    result = cluster.wait(job, timeout=300)
    assert (result.state, result.exit_code) == ("COMPLETED", 0), result.log
    assert "demo_256 is complete: 200 steps, 800 images" in result.log
    assert "stopped by SIGUSR1 (process 0, 1) after step" in result.log
    # Slurm may ask a start to end that the one before it was meant for: here a job starts again after 2 s, not after 120.
    # One that a busy Slurm cannot launch ("Communication connection failure") comes back, too.
    assert result.log.count("going on from ") + result.log.count("Application launch failed") >= 3
    last = newest(run_dir)
    assert last is not None
    last.verify()
    curve = list(scalars(run_dir, "train/loss"))
    assert curve == list(range(1, 201)), "a gap, or a doubled point"


def test_a_training_that_cannot_get_on_stops_after_its_bound(cluster, program, data_set: Path, tmp_path: Path) -> None:
    """A process that is killed in its first step each time: the third start says so and is the last."""
    python = program(
        textwrap.dedent(f"""
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from faults import at_step
        from pretrain.train import main
        at_step(0, 1, "SIGKILL")
        sys.exit(main(arguments[2:]))
        """)
    )
    words = [*SMALL, f"data.path={data_set}", "guard.seconds=30"]
    run_dir = tmp_path / "run"
    environment = {"CONFIG": "demo_256", "OVERRIDES": " ".join(words), "RUN_DIR": str(run_dir), "PYTHON": python}
    job = cluster.sbatch("slurm/stage1_256.sh", *TWO_NODES, env=environment)
    for restarts in (1, 2):
        cluster.start_requeued(job, restarts, timeout=300)
    result = cluster.wait(job, timeout=300)
    assert (result.state, result.exit_code) == ("FAILED", 1), result.log
    assert f"no progress: job {job} has started 3 times at step 0" in result.log
    assert len((run_dir / "starts.jsonl").read_text().splitlines()) == 3
