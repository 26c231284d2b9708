"""A real training asks its device nothing between logging steps, but for the guard's one sum a step."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import waits
from support import SMALL


def test_nothing_waits_for_the_device_between_logging_steps(data_set: Path, train, tmp_path: Path) -> None:
    """Over two micro-batches a step; the first step makes tables that are kept. DeepSpeed's own waits would show, too."""
    words = [*SMALL, f"data.path={data_set}", f"run_dir={tmp_path / 'run'}", "steps=6", "logging.every=3"]
    train("demo_256", *words, before=partial(waits.record, tmp_path / "reads"))
    reads = dict(json.loads(line) for line in (tmp_path / "reads").read_text().splitlines())
    assert list(reads) == [1, 2, 3, 4, 5, 6]
    verdict = ["tolist in resilience/spike_guard.py judge"]
    for step in (2, 4, 5):
        assert reads[step] == verdict, step
    for step in (3, 6):
        more = [read for read in reads[step] if read not in verdict]
        assert more and all(" in monitoring/" in read for read in more)
