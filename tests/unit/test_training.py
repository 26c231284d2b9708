"""The loop's decisions with small doubles for its parts.

Real training is in tests/distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain import training as module
from pretrain.config import load
from pretrain.diffusion import Loss
from pretrain.distributed.optimizer import learning_rate
from pretrain.state import DataPosition, RunState, StepHistory, StepVerdict
from pretrain.training import train, train_step

WELL = StepVerdict(1.0, 1.0)
ILL = StepVerdict(9.0, 9.0, "a spike")
STOP = StepVerdict(1.0, 1.0, stop=1)
DAMAGED = StepVerdict(1.0, 1.0, damaged=1)
FRESH = RunState()


class Recovery:
    """Writes down what the loop asks of it."""

    def __init__(self, calls: list[str], start: RunState) -> None:
        self.calls, self.state = calls, start
        self.lock = SimpleNamespace(keep=lambda: None)

    def start(self) -> RunState:
        return self.state

    def record_start(self, step: int) -> None:
        self.calls.append(f"start at {step}")

    def batches(self, state: RunState) -> Iterator[list[str]]:
        self.calls.append(f"batches from {state.step}")
        while True:
            yield ["batch"]

    def save(self, state: RunState, wait: bool) -> None:
        self.calls.append(f"save {state.step}" + (" and wait" if wait else ""))

    def log_saved(self) -> None:
        pass

    def log(self, line: str) -> None:
        self.calls.append(line)

    def count_damaged_shards(self, batches: list[str]) -> None:
        self.calls.append("count damaged shards")

    def report_skipped_step(self, state: RunState) -> None:
        self.calls.append(f"skipped {state.step}")

    def roll_back(self, state: RunState) -> RunState:
        self.calls.append(f"roll back at {state.step}")
        return RunState(1, history=StepHistory(rollbacks=state.history.rollbacks + 1))


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str | None, list[str]]]:
    """Runs the loop with these verdicts, one a step; returns its result and what it asked of its parts."""

    def run(
        *verdicts: StepVerdict, start: RunState = FRESH, validated: tuple[int, ...] = (), **overrides: Any
    ) -> tuple[str | None, list[str]]:
        words = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
        config = load("demo_256", ["data.path=/set", "optimizer.warmup_steps=0", "preview.every=0", *words])[0]
        calls: list[str] = []
        left = iter(verdicts)
        parts: Any = SimpleNamespace(
            config=config,
            deepspeed={},
            model=None,
            ema=None,
            loader=SimpleNamespace(position=DataPosition(2, 5), plan=None),
            engine=SimpleNamespace(world=None),
            guard=SimpleNamespace(verdict=None, stop_reason=lambda: "SIGUSR1 (process 1)"),
            watchdog=SimpleNamespace(step=0, finish_step=lambda step: None, begin=lambda activity: None),
            monitor=SimpleNamespace(close=lambda: calls.append("close")),
            preview=SimpleNamespace(due=lambda step: False),
            validation=SimpleNamespace(
                due=lambda step: step in validated, run=lambda *given: calls.append(f"validate {given[-1]}")
            ),
            recovery=Recovery(calls, start),
        )

        def one_step(t: Any, batches: list[str], state: RunState) -> RunState:
            t.guard.verdict = next(left)
            return replace(state, step=state.step + 1, history=state.history.after(t.guard.verdict, 10))

        monkeypatch.setattr(module, "train_step", one_step)
        monkeypatch.setattr(module, "save_provenance", lambda *_: calls.append("provenance"))
        monkeypatch.setattr(module, "start_summary", lambda *_: "summary")
        return train(parts), calls

    return run


def test_a_run_is_complete_after_its_steps_with_a_last_checkpoint(loop) -> None:
    result, calls = loop(*[WELL] * 5, steps=5, checkpoint__every=2)
    assert result is None
    assert calls[:4] == ["provenance", "start at 0", "summary", "batches from 0"]
    assert calls[4:-2] == ["save 2", "save 4", "save 5 and wait"]
    assert calls[-2] == "close"
    assert calls[-1].startswith("demo_256 is complete: 5 steps, 0 images; ")


def test_it_is_validated_before_the_first_step_and_before_a_checkpoint(loop) -> None:
    """A resumed run has been validated at the step that it starts from."""
    _, calls = loop(*[WELL] * 3, steps=3, checkpoint__every=2, validated=(0, 2, 3))
    assert calls[3:8] == ["validate 0", "batches from 0", "validate 2", "save 2", "validate 3"]
    _, calls = loop(WELL, start=RunState(2), steps=3, validated=(0, 2, 3))
    assert calls[3:6] == ["batches from 2", "validate 3", "save 3 and wait"]


def test_a_resumed_run_goes_on_after_its_step_and_a_finished_one_does_nothing(loop) -> None:
    _, calls = loop(WELL, start=RunState(4), steps=5)
    assert calls[1:5] == ["start at 4", "summary", "batches from 4", "save 5 and wait"]
    _, calls = loop(start=RunState(5), steps=5)
    assert not [call for call in calls if call.startswith("save")]


def test_asked_to_stop_it_saves_and_says_by_what(loop) -> None:
    result, calls = loop(WELL, STOP, steps=5)
    assert result == "SIGUSR1 (process 1)"
    assert calls[-2] == "save 2 and wait"
    assert calls[-1] == "stopped by SIGUSR1 (process 1) after step 2; started again, it goes on from there"


def test_asked_to_stop_in_its_last_step_it_is_complete(loop) -> None:
    assert loop(WELL, STOP, steps=2)[0] is None


def test_skipped_steps_in_a_row_lead_to_a_rollback_others_do_not(loop) -> None:
    _, calls = loop(ILL, WELL, ILL, ILL, *[WELL] * 3, steps=4, guard__patience=2, checkpoint__every=100)
    expected = ["skipped 1", "skipped 3", "skipped 4", "roll back at 4", "batches from 1", "save 4 and wait"]
    assert calls[4:-2] == expected


def test_damaged_data_is_counted(loop) -> None:
    _, calls = loop(WELL, DAMAGED, WELL, steps=3)
    assert calls.count("count damaged shards") == 1


# ---- a step ----


@pytest.mark.parametrize("applied", [True, False])
def test_a_step_counts_what_was_tried_and_what_was_applied(applied: bool) -> None:
    config = load("demo_256", ["data.path=/set", "steps=20", "optimizer.warmup_steps=10"])[0]
    verdict = StepVerdict(2.0, 3.0, None if applied else "a spike")
    calls: list[Any] = []

    class Engine:
        world = SimpleNamespace(size=4, device="cpu")
        dtype = torch.float32

        def backward(self, loss: torch.Tensor) -> None:
            calls.append(("backward", loss.item()))

        def step(self, lr: float, judge: Any) -> None:
            calls.append(("step", lr))

        @property
        def applied(self) -> bool:
            return applied

    def batch(*keys: str) -> Any:
        return SimpleNamespace(keys=keys, damaged=(), to=lambda device, dtype: batch(*keys))

    losses = iter([1.0, 3.0])
    t: Any = SimpleNamespace(
        config=config,
        engine=Engine(),
        model=SimpleNamespace(config=config.model.backbone()),
        loss=SimpleNamespace(
            plan=lambda step: SimpleNamespace(group=0),
            compute=lambda batch, plan: Loss(torch.tensor(next(losses)), torch.ones(2), torch.ones(2)),
        ),
        watchdog=SimpleNamespace(begin=lambda activity: None),
        guard=SimpleNamespace(verdict=verdict, begin=lambda *_: None, add=lambda *_: None, judge=None),
        ema=SimpleNamespace(update=lambda step: calls.append(("average", step))),
        monitor=SimpleNamespace(step=lambda step, verdict, lr: calls.append(("monitor", step))),
    )
    before = RunState(6, 5, 100, DataPosition(0, 6))
    after = train_step(t, [batch("a", "b"), batch("c", "d")], before)
    assert (after.step, after.updates, after.images) == (7, 5 + applied, 100 + 4 * 4)
    assert after.history.losses == ((2.0,) if applied else ())
    assert after.history.skipped == (not applied)
    lr = learning_rate(6, 20, config.optimizer)
    average = [("average", 5)] if applied else []  # counted in applied steps
    assert calls == [("backward", 1.0), ("step", lr), ("backward", 3.0), ("step", lr), *average, ("monitor", 7)]
