"""slurm/encode.sh on a real two-node cluster with the real encoding: a task is cancelled, and the job submitted again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, contents

from data_prep import schema
from data_prep.shapes import write_tars
from data_prep.worker.claims import read_claim
from data_prep.worker.parts import whole_parts

pytestmark = pytest.mark.slurm

TARS, PER_TAR = 16, 12
OPTIONS = "--decoders 1 --claim-timeout 6"


def claims_now(root: Path) -> list[bytes]:
    """What the claims say that tasks hold this very moment; one may be gone before it is read."""
    claims = (read_claim(path) for path in (root / schema.WORK / "claims").glob("*.claim"))
    return [claim for claim in claims if claim]


def test_an_array_of_four_of_which_one_is_cancelled(cluster, tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", TARS * PER_TAR, seed=2, per_tar=PER_TAR)
    root = tmp_path / "data"
    environment = {
        "INPUT": str(tmp_path / "tars"),
        "OUTPUT": str(root),
        "ENCODERS": "tiny",
        "RESOLUTIONS": "64",
        "OVERRIDES": OPTIONS,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    options = ["--array=0-3", "--cpus-per-task=1", "--mem=0", "--gpus-per-node=0"]
    job = cluster.sbatch("slurm/encode.sh", *options, env=environment)
    deadline = time.monotonic() + 200
    while not (claims := claims_now(root)) or not whole_parts(root):
        assert time.monotonic() < deadline, cluster.show(job)
        time.sleep(0.05)
    holder = json.loads(claims[0])["slurm_job"]
    (victim,) = [t for t in cluster.show(job) if t["JobId"] == holder]
    cluster.command("scancel", f"{victim['ArrayJobId']}_{victim['ArrayTaskId']}")
    cluster.wait(job, timeout=240)
    states = sorted(t["JobState"] for t in cluster.show(job))
    assert states == ["CANCELLED", "COMPLETED", "COMPLETED", "COMPLETED"]

    again = cluster.wait(cluster.sbatch("slurm/encode.sh", *options, env=environment), timeout=240)
    assert (again.state, again.exit_code) == ("COMPLETED", 0), again.log
    card = schema.Card.load(root)
    assert card.complete
    assert card.counts["read"] == card.counts["written"] == TARS * PER_TAR
    verify = subprocess.run(
        [sys.executable, "data_prep/verify.py", str(root)], cwd=ROOT, capture_output=True, text=True
    )
    assert verify.returncode == 0, verify.stdout + verify.stderr

    alone = tmp_path / "alone"
    command = [sys.executable, "data_prep/encode.py", "--input", str(tmp_path / "tars"), "--output", str(alone)]
    words = ["--encoders", "tiny", "--resolutions", "64", *OPTIONS.split()]
    subprocess.run([*command, *words], cwd=ROOT, env=cluster.env | {"OMP_NUM_THREADS": "1"}, check=True)
    assert contents(alone) == contents(root)
