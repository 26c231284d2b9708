"""Log of a SLURM job's starts, and an end to a job that is requeued again and again without progress.

RUN/starts.jsonl   one line a start: job, number of requeues, first step, time, host

Only what the scheduler starts anew counts (SLURM_RESTART_COUNT): a person may start as often as they like within a job.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from data_prep.common.files import atomic_write

STARTS = "starts.jsonl"


def record_start(run_dir: Path, step: int, stalls: int = 2, complete: bool = False) -> None:
    """Records that a SLURM job starts the run at `step`; does nothing outside of SLURM. Process 0 calls it.

    Args:
        complete: the run has nothing left to do, and so cannot get on.

    Raises:
        RuntimeError: the job has started at the same step after each of its last `stalls` requeues, too.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    path = run_dir / STARTS
    before = path.read_text() if path.is_file() else ""
    start = {
        "job": job,
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        "step": step,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "host": socket.gethostname(),
    }
    text = before + json.dumps(start) + "\n"
    run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text)
    starts = [s for s in map(json.loads, text.splitlines()) if s["job"] == job]
    last = list({s["restart"]: s for s in starts}.values())[-1 - stalls :]  # the last one after each requeue
    if len(last) > stalls and {s["step"] for s in last} == {step} and start["restart"] and not complete:
        times = ", ".join(f"{s['time']} on {s['host']}" for s in last)
        raise RuntimeError(
            f"no progress: job {job} has started {len(last)} times at step {step} ({times}); see its log for why it "
            "stopped; submit it anew to try again"
        )
