"""Validation in real trainings: the same figures in one, two and four processes, and nothing of the training changed."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from data_sets import write_set
from faults import at_step
from support import SMALL, ended, fork_training, scalars, state_of

TAGS = [
    f"{name}/loss{level}"
    for name in ("validation", "validation_ema")
    for level in ("", *(f"_t{i / 8:.3f}" for i in range(8)))
]
# Of fp32 losses: processes lay the weights at other places, and products of other batches round otherwise.
ROUNDING = 2e-6


def test_validation_changes_nothing_but_the_curves(train, tmp_path: Path) -> None:
    """Of a run that is killed and started again, too. Two and four processes with batches of their own find the same losses."""
    root = write_set(tmp_path / "set", {"a": 24, "b": 40})
    words = [*SMALL, f"data.path={root}", "checkpoint.every=2", "checkpoint.background=false"]
    validating = ["data.validation=b", "data.validation_samples=40", "logging.validate_every=2"]
    plain, validated = ([*words, "steps=4", *more] for more in (["data.sources={a: 1}"], validating))
    train("demo_256", *plain, f"run_dir={tmp_path / 'plain'}")
    validated.append(f"run_dir={tmp_path / '1'}")
    (process,) = fork_training(tmp_path / "log", "demo_256", *validated, before=partial(at_step, 3, 0, "SIGKILL"))
    assert ended([process]) == [-signal.SIGKILL], (tmp_path / "log").read_text()
    assert "going on from" in train("demo_256", *validated).output

    expected = state_of(tmp_path / "plain")
    assert all(torch.equal(value, expected[name]) for name, value in state_of(tmp_path / "1").items())
    assert scalars(tmp_path / "plain", "train/loss") == scalars(tmp_path / "1", "train/loss")
    found = {tag: scalars(tmp_path / "1", tag) for tag in TAGS}
    assert all(list(curve) == [0, 2, 4] for curve in found.values())
    assert found["validation/loss"][0] == found["validation_ema/loss"][0]
    assert len({curve[4] for curve in found.values()}) == 18

    for processes, micro in ((2, 2), (4, 1)):
        run_dir = tmp_path / str(processes)
        geometry = f"deepspeed.train_micro_batch_size_per_gpu={micro}"
        train("demo_256", *words, *validating, geometry, "steps=2", f"run_dir={run_dir}", processes=processes)
        for tag in TAGS:
            curve = scalars(run_dir, tag)
            assert curve[0] == pytest.approx(found[tag][0], rel=ROUNDING), (processes, tag)
            assert curve[2] == pytest.approx(found[tag][2], rel=1e-3), (processes, tag)
