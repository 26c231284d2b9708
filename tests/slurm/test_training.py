"""The stage scripts on a real two-node cluster, with real training: DeepSpeed over two nodes, an evaluation beside it,
and the chained schedule."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, SMALL, scalars

from data_prep.schema import Card
from data_prep.shapes import scenes
from pretrain.checkpoint.reader import newest

pytestmark = pytest.mark.slurm

ONE_NODE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--mem=0")
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


def test_a_training_is_followed_to_its_end(cluster, data_set: Path, tmp_path: Path) -> None:
    """Each of its checkpoints is evaluated once, at its step; the training ends as it would alone."""
    every, last_step = 4, 12
    run, out, prompts = tmp_path / "run", tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{s.caption}\n" for s in scenes(2, 1)))
    kept = [f"checkpoint.every={every}", f"checkpoint.keep_every={every}"]
    words = " ".join([*SMALL, f"data.path={data_set}", f"steps={last_step}", *kept])
    shared = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment = shared | {"CONFIG": "demo_256", "OVERRIDES": words, "RUN_DIR": str(run)}
    training = cluster.sbatch("slurm/stage1_256.sh", *ONE_NODE, env=environment)
    deadline = time.monotonic() + 200
    while not (run / "config.yaml").exists():
        assert time.monotonic() < deadline, cluster.show(training)
        time.sleep(0.1)
    environment = shared | {"RUN": str(run), "PROMPTS": str(prompts), "METRICS": "shapes", "OUT": str(out)}
    environment |= {"EVERY": str(every), "OVERRIDES": "--steps 2 --height 64 --width 64 --poll 0.5"}
    job = cluster.sbatch("slurm/evaluate.sh", *ONE_NODE, "--cpus-per-task=1", env=environment)

    followed, trained = cluster.wait(job, timeout=240), cluster.wait(training, timeout=240)
    assert (trained.state, trained.exit_code) == ("COMPLETED", 0), trained.log
    assert (followed.state, followed.exit_code) == ("COMPLETED", 0), followed.log
    assert f"{run} is complete at step {last_step}: 3 checkpoints evaluated now" in followed.log
    steps = [*range(every, last_step + 1, every)]
    assert [p.name for p in sorted(out.iterdir())] == [f"step_{step:08d}" for step in steps]
    for step in steps:
        found = json.loads((out / f"step_{step:08d}" / "shapes.json").read_text())
        assert (found["status"], found["pictures"]["step"], found["pictures"]["count"]) == ("done", step, 2)
    assert [*scalars(run / "evaluate", "evaluate/shapes/tasks")] == steps
    assert [*scalars(run, "train/loss")] == [*range(1, last_step + 1)]
    last = newest(run)
    assert last is not None and last.run_state.step == last_step
    last.verify()


def test_the_schedule_runs_from_tars_to_stage_3(cluster, shape_tars: Path, tmp_path: Path) -> None:
    """encode → stage 1 → stage 2 → stage 3 by dependencies, each a real job; the third draws a named source."""
    data, runs = tmp_path / "data", tmp_path / "runs"
    small = " ".join([*SMALL, "steps=2"])
    environment = cluster.env | {
        "INPUT": f"{shape_tars}/*.tar",
        "OUTPUT": str(data),
        "ENCODERS": "tiny",
        "STAGE1": "demo_256",
        "STAGE2": "demo_512",
        "STAGE3": "demo_512",
        "STAGE1_OVERRIDES": f"{small} run_dir={runs / 'one'}",
        "STAGE2_OVERRIDES": f"{small} run_dir={runs / 'two'} init_from={runs / 'one'}",
        "STAGE3_OVERRIDES": f"{small} run_dir={runs / 'three'} init_from={runs / 'two'} optimizer.ema_decay=0.5 "
        "data.sources.images=1",
        "ENCODE_SBATCH": "--array=0-1 --cpus-per-task=1 --mem=0 --gpus-per-task=0 --gpus=0",
        "TRAIN_SBATCH": " ".join(TWO_NODES),
        "PYTHON": sys.executable,
    }
    shown = subprocess.run(["bash", "slurm/schedule.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    jobs = [line.split()[0] for line in shown.stdout.splitlines() if "slurm/" in line]
    assert len(jobs) == 4
    for job in jobs:
        result = cluster.wait(job, timeout=240)
        assert (result.state, result.exit_code) == ("COMPLETED", 0), result.log
    assert Card.load(data).counts["written"] == 20
    assert "its weights and average" in result.log
    assert f"starting demo_512 from {runs / 'two'}" in result.log
    assert [newest(runs / run).run_state.step for run in ("one", "two", "three")] == [2, 2, 2]  # type: ignore[union-attr]
