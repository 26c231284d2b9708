"""`srun python -m pretrain.train …`, without the scripts of slurm/: Slurm's own variables make the tasks one world."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support import SMALL

from pretrain.checkpoint.reader import newest

pytestmark = pytest.mark.slurm

TRAIN = (sys.executable, "-m", "pretrain.train", "demo_256", *SMALL, "steps=2")


@pytest.mark.parametrize(
    "placed",
    [
        pytest.param(("--nodes=2", "--ntasks=2"), id="two nodes"),
        pytest.param(("--nodes=1", "--ntasks=2"), id="one node"),
    ],
)
def test_the_tasks_of_srun_are_one_world(placed: tuple[str, ...], cluster, data_set: Path, tmp_path: Path) -> None:
    """In an allocation of its own, as a user at a login node starts it."""
    words = [*TRAIN, f"data.path={data_set}", f"run_dir={tmp_path / 'run'}"]
    done = cluster.command("srun", *placed, "--cpus-per-task=1", "--mem=0", *words, env={"OMP_NUM_THREADS": "1"})
    assert done.stdout.count("demo_256 is complete: 2 steps, 8 images") == 1, done.stdout + done.stderr
    found = newest(tmp_path / "run")
    assert found is not None and found.state["world"] == 2


def test_a_batch_script_without_srun_is_told_the_way(cluster, data_set: Path, tmp_path: Path) -> None:
    """`#SBATCH --ntasks=2` and the command itself: one process would train alone on the reserved tasks."""
    script = tmp_path / "job.sh"
    words = " ".join([*TRAIN, f"data.path={data_set}", f"run_dir={tmp_path / 'run'}"])
    script.write_text(f"#!/bin/bash\n{words}\n")
    result = cluster.wait(cluster.sbatch(script, "--nodes=2", "--ntasks=2", "--cpus-per-task=1", "--mem=0"))
    assert (result.state, result.exit_code) == ("FAILED", 1), result.log
    assert "train: Slurm reserved 2 tasks, but this is the batch script, of which there is one: " in result.log
    assert not (tmp_path / "run").exists()
