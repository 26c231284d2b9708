"""Helpers of many tests: real training processes, and what they left in event files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Small steps of the demo's stage, for tests: 4 pictures a step.
SMALL = (
    "deepspeed.train_batch_size=4",
    "deepspeed.train_micro_batch_size_per_gpu=2",
    "preview.every=0",
    "optimizer.warmup_steps=2",
    "logging.every=1",
)


@dataclass(frozen=True)
class Finished:
    """Processes that ended: exit codes by rank, and all they printed."""

    codes: list[int]
    output: str


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_training(config: str, *overrides: str, processes: int = 1) -> list[subprocess.Popen[str]]:
    """Real training processes over gloo, with the variables that a launcher sets."""
    port = str(free_port())
    started = []
    for rank in range(processes):
        launcher = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": str(max(1, 2 // processes)),
        }
        command = [sys.executable, "-m", "pretrain.train", config, *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | launcher, text=True, **pipes))  # type: ignore[call-overload]
    return started


def scalars(run_dir: Path, tag: str) -> dict[int, float]:
    """A curve of a run's event files, by step; a step that was written twice is an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    points = events.Scalars(tag)
    assert len({p.step for p in points}) == len(points), f"{tag} has doubled points"
    return {p.step: p.value for p in points}
