"""What a checkpoint keeps of a run: the same JSON as ever, the history of each group, and no heavy library."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from support import ROOT

from pretrain.state import DataPosition, RunState, StepHistory, StepVerdict


def test_importing_it_loads_neither_torch_nor_deepspeed() -> None:
    heavy = ("torch", "deepspeed", "streaming", "numpy")
    code = f"import sys, pretrain.state; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- JSON ----

# As the first versions of this project wrote it.
JSON = """{"step": 9, "updates": 8, "images": 36, "position": {"epoch": 1, "step_in_epoch": 4},
"health": {"losses": [0.5, 0.25], "norms": [2.0, 3.0], "bins": [3, 0], "skipped": 4, "in_a_row": 2, "rollbacks": 1}}"""
STATE = RunState(9, 8, 36, DataPosition(1, 4), StepHistory((0.5, 0.25), (2.0, 3.0), (3, 0), 4, 2, 1))


def test_the_json_of_older_checkpoints_is_read() -> None:
    assert RunState.from_json(json.loads(JSON)) == STATE


def test_the_json_that_is_written_can_be_read_by_older_versions() -> None:
    assert json.loads(json.dumps(STATE.to_json())) == json.loads(JSON)


def test_json_keeps_every_bit() -> None:
    state = RunState(history=StepHistory((0.1, 1 / 3), (math.pi, 2e-300), (0, 3)))
    assert RunState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_a_json_without_one_of_its_keys_is_refused() -> None:
    content = json.loads(JSON)
    del content["health"]["rollbacks"]
    with pytest.raises(KeyError, match="rollbacks"):
        RunState.from_json(content)


# ---- history ----


def test_of_each_group_the_last_steps_are_kept() -> None:
    history = StepHistory()
    for i in range(12):
        history = history.after(StepVerdict(float(i), 10.0 * i, group=i % 3 if i < 9 else 0), window=2)
    assert history.groups == (1, 2, 1, 2, 0, 0)
    assert history.losses == (4.0, 5.0, 7.0, 8.0, 10.0, 11.0)
    assert history.losses_of(1) == (4.0, 7.0)
    assert history.norms_of(1) == (40.0, 70.0)
    assert history.losses_of(9) == ()


def test_skipped_steps_are_counted_but_not_kept() -> None:
    history = StepHistory((1.0, 2.0), (3.0, 4.0), (0, 0), skipped=1)
    history = history.after(StepVerdict(99.0, 99.0, "a spike"), window=2)
    assert (history.losses, history.skipped, history.in_a_row) == ((1.0, 2.0), 2, 1)
    history = history.after(StepVerdict(5.0, 6.0), window=2)
    assert (history.losses, history.norms, history.skipped, history.in_a_row) == ((2.0, 5.0), (4.0, 6.0), 2, 0)
