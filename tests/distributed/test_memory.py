"""Memory of ZeRO-2 as planned against the tensors that real processes hold over gloo, and against those that nobody planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from held_tensors import measure
from support import ended, fork, free_port, launcher

WORDS = (
    "data.path=/not/read",
    "data.resolution=64",
    "preview.every=0",
    "deepspeed.train_micro_batch_size_per_gpu=2",
    "deepspeed.zero_optimization.reduce_bucket_size=100000",
)


@pytest.mark.parametrize(
    ("processes", "bf16", "optimizer"), [(1, True, "adamw"), (2, False, "muon"), (4, True, "adamw")]
)
def test_states_are_what_the_processes_hold(processes: int, bf16: bool, optimizer: str, tmp_path: Path) -> None:
    """Each part within 1%, and nothing else of a hundredth of their sum: no second copy, no buffer for the buckets."""
    words = [*WORDS, f"run_dir={tmp_path / 'run'}", f"deepspeed.train_batch_size={4 * processes}"]
    words += [f"deepspeed.bf16.enabled={str(bf16).lower()}", f"optimizer.name={optimizer}"]
    port = str(free_port())
    started = [
        fork(tmp_path / "log", measure, tmp_path, words, **launcher(r, processes, port)) for r in range(processes)
    ]
    assert ended(started) == [0] * processes, (tmp_path / "log").read_text()
    for rank in range(processes):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        planned, measured = found["planned"], found["measured"]
        rest = measured.pop("rest")
        assert measured == pytest.approx(planned, rel=0.01)
        assert rest < 0.01 * sum(planned.values())
