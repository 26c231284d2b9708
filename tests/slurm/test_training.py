"""The stage scripts on a real two-node cluster, with real training: DeepSpeed over two nodes, and the chained schedule."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, SMALL, scalars

from data_prep.schema import Card
from pretrain.checkpoint.reader import newest

pytestmark = pytest.mark.slurm

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0")


def test_stage_1_trains_over_two_nodes(cluster, data_set: Path, tmp_path: Path) -> None:
    """`CONFIG=demo_256 sbatch --nodes=2 … slurm/stage1_256.sh`: ZeRO-2, a checkpoint, event files, exit 0."""
    words = " ".join([*SMALL, f"data.path={data_set}", "steps=3"])
    environment = {"CONFIG": "demo_256", "OVERRIDES": words, "RUN_DIR": str(tmp_path / "run"), "PYTHON": sys.executable}
    result = cluster.wait(cluster.sbatch("slurm/stage1_256.sh", *TWO_NODES, env=environment), timeout=240)
    assert (result.state, result.exit_code) == ("COMPLETED", 0), result.log
    assert "demo_256 is complete: 3 steps, 12 images" in result.log
    found = newest(tmp_path / "run")
    assert found is not None
    found.verify()
    assert found.state["world"] == 2
    assert len(list(found.path.glob("rank_*"))) == 2
    assert list(scalars(tmp_path / "run", "train/loss")) == [1, 2, 3]


def test_the_schedule_runs_from_tars_to_stage_2(cluster, shape_tars: Path, tmp_path: Path) -> None:
    """encode → stage 1 → stage 2 by dependencies, each a real job."""
    data, runs = tmp_path / "data", tmp_path / "runs"
    small = " ".join([*SMALL, "steps=2"])
    environment = cluster.env | {
        "INPUT": f"{shape_tars}/*.tar",
        "OUTPUT": str(data),
        "ENCODERS": "tiny",
        "STAGE1": "demo_256",
        "STAGE2": "demo_512",
        "STAGE1_OVERRIDES": f"{small} run_dir={runs / 'one'}",
        "STAGE2_OVERRIDES": f"{small} run_dir={runs / 'two'} init_from={runs / 'one'}",
        "ENCODE_SBATCH": "--array=0-1 --cpus-per-task=1 --mem=0 --gpus-per-task=0 --gpus=0",
        "TRAIN_SBATCH": " ".join(TWO_NODES),
        "PYTHON": sys.executable,
    }
    shown = subprocess.run(["bash", "slurm/schedule.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    jobs = [line.split()[0] for line in shown.stdout.splitlines() if "slurm/" in line]
    assert len(jobs) == 3
    for job in jobs:
        result = cluster.wait(job, timeout=240)
        assert (result.state, result.exit_code) == ("COMPLETED", 0), result.log
    assert Card.load(data).counts["written"] == 20
    assert "its weights and average" in result.log
    assert newest(runs / "two").run_state.step == 2  # type: ignore[union-attr]
