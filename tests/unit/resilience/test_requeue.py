"""A job that comes back without getting on is stopped; one that gets on, or is submitted anew, is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import SMALL

from pretrain.resilience.requeue import STARTS, record_start


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch):
    """Makes this the start of a Slurm job after so many requeues."""

    def be(number: str, restart: int) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", number)
        if restart:
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        else:
            monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)

    return be


def begin(job, run: Path, number: str, steps: list[int], **how: Any) -> None:
    for restart, step in enumerate(steps):
        job(number, restart)
        record_start(run, step, **how)


def test_three_starts_at_one_step_are_no_progress(job, tmp_path: Path) -> None:
    begin(job, tmp_path / "run", "7", [400, 400])
    job("7", 2)
    with pytest.raises(RuntimeError, match=r"^no progress: job 7 has started 3 times at step 400 \(.*, .*, .*\); see"):
        record_start(tmp_path / "run", 400)
    lines = [json.loads(line) for line in (tmp_path / "run" / STARTS).read_text().splitlines()]
    assert [(s["job"], s["restart"], s["step"]) for s in lines] == [("7", 0, 400), ("7", 1, 400), ("7", 2, 400)]


def test_a_job_that_gets_on_may_start_for_ever(job, tmp_path: Path) -> None:
    begin(job, tmp_path, "7", [0, 0, 10, 10, 20, 20, 10, 10])


def test_the_number_of_starts_is_the_callers(job, tmp_path: Path) -> None:
    begin(job, tmp_path, "7", [5, 5, 5], stalls=3)
    job("7", 3)
    with pytest.raises(RuntimeError, match="started 4 times"):
        record_start(tmp_path, 5, stalls=3)


def test_a_job_submitted_anew_counts_anew(job, tmp_path: Path) -> None:
    begin(job, tmp_path, "7", [5, 5])
    begin(job, tmp_path, "8", [5, 5])
    job("8", 2)
    with pytest.raises(RuntimeError, match="job 8 has started 3 times"):
        record_start(tmp_path, 5)


def test_a_persons_own_starts_do_not_count(job, tmp_path: Path) -> None:
    """Within a job of salloc a training is started as often as one likes; between requeues, too."""
    for restart in (0, 0, 0, 0, 1, 1, 1):
        job("7", restart)
        record_start(tmp_path, 5)
    job("7", 2)
    with pytest.raises(RuntimeError, match="job 7 has started 3 times at step 5"):
        record_start(tmp_path, 5)


def test_a_finished_run_cannot_get_on(job, tmp_path: Path) -> None:
    begin(job, tmp_path, "7", [5, 5, 5, 5], complete=True)


def test_outside_of_slurm_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for _ in range(5):
        record_start(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_training_without_progress_fails(job, train, data_set: Path, tmp_path: Path) -> None:
    begin(job, tmp_path, "7", [0, 0])
    job("7", 2)
    words = [f"data.path={data_set}", *SMALL, f"run_dir={tmp_path}"]
    finished = train("demo_256", *words, check=False)
    assert finished.codes == [1]
    assert "train: no progress: job 7 has started 3 times at step 0 (" in finished.output
    assert "Traceback" not in finished.output
