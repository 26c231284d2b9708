"""How a run starts and goes on after faults: each decision by itself, the parts around it replaced by small doubles.

tests/distributed/test_faults.py has the same decisions with real processes and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.config import load
from pretrain.distributed.world import World
from pretrain.resilience import recovery
from pretrain.resilience.recovery import Recovery
from pretrain.state import DataPosition, RunState, StepHistory, StepVerdict

DATA = {"path": "/set"}  # of an earlier run


class Monitor:
    """Records what it is told."""

    def __init__(self) -> None:
        self.resumed: list[tuple[int, list[float]]] = []
        self.waits: list[float] = []
        self.pauses: list[tuple[int, float]] = []

    def resume(self, step: int, saved: list[float]) -> None:
        self.resumed.append((step, saved))

    def add_data_wait(self, seconds: float) -> None:
        self.waits.append(seconds)

    def record_checkpoint_pause(self, step: int, seconds: float) -> None:
        self.pauses.append((step, seconds))

    def pending_sums(self) -> list[float]:
        return [1.0, 2.0]

    def paused(self) -> Any:
        return torch.no_grad()  # any context


class Writer:
    """A checkpoint that comes to what `error` says."""

    def __init__(self) -> None:
        self.run_info: dict[str, Any] = {"data": {}, "config": {}}
        self.error: str | None = None
        self.calls: list[Any] = []

    def save(self, state: RunState, pending_sums: list[float]) -> None:
        self.calls.append((state, pending_sums))

    def wait(self) -> None:
        self.calls.append("wait")

    def report(self) -> str | None:
        return None


class Loader:
    """Numbered steps, each of which takes 3 s to come."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.resumed, self.fingerprint = clock, (), {"seed": 0}

    def resume(self, position: DataPosition, rollbacks: int) -> None:
        self.resumed = (position, rollbacks)

    def __iter__(self):
        for number in count():
            self.clock[0] += 3
            yield [number]


def found(run_state: RunState, **state: Any) -> Any:
    """A checkpoint."""
    return SimpleNamespace(
        path=Path(f"step_{run_state.step}"),
        run_state=run_state,
        pending_sums=lambda world: [4.0],
        state={"data": {}, "config": {}, **state},
    )


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recovery]:
    """A recovery of a run with these overrides, and these checkpoints, the newest first."""

    def build(*overrides: str, checkpoints: list[Any] | None = None, others: list[Any] | None = None) -> Recovery:
        config = load("demo_256", [f"run_dir={tmp_path}", "data.path=/set", *overrides])[0]
        clock = [0.0]
        monkeypatch.setattr(recovery, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

        def newest_intact(run: Path, world: World, warn: Any, wanted: Any = lambda _: True) -> Any:
            there = checkpoints if run == tmp_path else others
            return next((c for c in there or [] if wanted(c)), None)

        monkeypatch.setattr(recovery.checkpoint, "newest_intact", newest_intact)
        monkeypatch.setattr(recovery.checkpoint, "find_run", Path)
        monkeypatch.setattr(
            recovery.checkpoint, "set_aside_later", lambda run, step, world: lines.append(f"keep {step}")
        )
        monkeypatch.setattr(recovery, "resume", lambda own, engine, ema, data: own.run_state)
        monkeypatch.setattr(recovery, "restore_weights", lambda *_, moments: [f"moments: {moments}"])
        engine: Any = SimpleNamespace(world=World(0, 1, torch.device("cpu")))
        guard: Any = SimpleNamespace(verdict=StepVerdict(9.0, 9.0, "the loss is nan"))
        watchdog: Any = SimpleNamespace(begin=lambda activity: None)
        lock: Any = SimpleNamespace(require=lambda: lines.append("the lock is held"))
        parts: Any = (config, Loader(clock), engine, None, guard, watchdog, Monitor(), Writer(), lock, lines.append)
        return Recovery(*parts)

    return build


# ---- start ----


def test_a_run_without_anything_starts_from_nothing(make, lines) -> None:
    r = make()
    assert r.start() == RunState()
    assert r.monitor.resumed == [(0, [])]
    assert lines == ["starting demo_256 from nothing"]


def test_a_runs_own_newest_checkpoint_comes_first(make, lines) -> None:
    state = RunState(6, 5, 24, DataPosition(1, 1))
    r = make("init_from=other", checkpoints=[found(state), found(RunState(3))])
    assert r.start() == state
    assert r.monitor.resumed == [(6, [4.0])]
    assert lines == ["keep 6", "going on from step_6: step 6, epoch 1, its step 1"]


@pytest.mark.parametrize(("carry", "updates"), [("false", 0), ("true", 5)])
def test_another_runs_weights_are_where_a_stage_starts(make, lines, carry: str, updates: int) -> None:
    other = found(RunState(6, 5, 24), config={"steps": 6, "seed": 1, "data": DATA})
    r = make("init_from=other", f"carry_moments={carry}", others=[other])
    assert r.start() == RunState(updates=updates)
    assert lines[-1] == f"  moments: {carry.title()}"
    assert not [line for line in lines if "WARNING" in line]


def test_a_run_that_is_not_finished_is_warned_of(make, lines) -> None:
    make("init_from=other", others=[found(RunState(4), config={"steps": 6, "data": DATA})]).start()
    assert lines[0] == "WARNING: other is not finished: it has 4 of its 6 steps"


def test_a_run_that_was_trained_on_what_is_held_out_is_warned_of(make, lines) -> None:
    """One that held out as much, or more, was not."""
    for before, warnings in ((None, 1), (0.1, 1), (0.2, 0), (0.3, 0)):
        config = {"steps": 4, "data": DATA | {"validation": before}}
        lines.clear()
        make("init_from=other", "data.validation=0.2", others=[found(RunState(4), config=config)]).start()
        assert [line.partition(" that")[0] for line in lines if "WARNING" in line] == warnings * [
            "WARNING: other was trained on samples"
        ]


def test_fields_with_an_older_name_are_no_change(make, lines) -> None:
    r = make("init_from=other", others=[found(RunState(6), config={"steps": 6, "guard": {"after": 7}, "data": DATA})])
    r.saver.run_info["config"].update({"steps": 9, "guard": {"min_history": 7}, "data": DATA})
    r.start()
    changes = [line for line in lines if "→" in line]
    assert changes == ["  steps: 6 → 9"]


def test_another_run_without_a_checkpoint_is_an_error(make) -> None:
    with pytest.raises(ValueError, match=r"^init_from: other has no complete checkpoint yet; train it first$"):
        make("init_from=other").start()


def test_a_job_without_progress_is_an_error(make, monkeypatch) -> None:
    def refuse(run_dir: Path, step: int, complete: bool) -> None:
        raise RuntimeError(f"no progress at {step}")

    monkeypatch.setattr(recovery, "record_start", refuse)
    with pytest.raises(RuntimeError, match="no progress at 7"):
        make().record_start(7)


def test_batches_come_from_the_state_and_their_wait_is_told(make) -> None:
    r = make()
    state = RunState(position=DataPosition(1, 3), history=StepHistory(rollbacks=2))
    assert list(islice(r.batches(state), 2)) == [[0], [1]]
    assert r.loader.resumed == (DataPosition(1, 3), 2)
    assert r.monitor.waits == [3.0, 3.0]


# ---- checkpoints ----


def test_a_checkpoint_in_the_background_is_not_waited_for(make) -> None:
    r = make()
    r.saver.error = "a full disk"
    r.save(RunState(4), wait=False)
    assert r.saver.calls == ["wait", (RunState(4), [1.0, 2.0])]  # waits for the one before
    assert r.monitor.pauses == [(4, 0.0)]


def test_a_last_checkpoint_that_fails_is_an_error(make) -> None:
    r = make()
    r.save(RunState(4), wait=True)
    r.saver.error = "a full disk"
    with pytest.raises(RuntimeError, match="a full disk"):
        r.save(RunState(5), wait=True)


# ---- damaged shards ----


def batch(*shards: str) -> Any:
    return SimpleNamespace(damaged=[SimpleNamespace(shard=name, sample=3, reason="its CRC differs") for name in shards])


def test_each_damaged_shard_is_told_of_once(make, lines) -> None:
    r = make("data.damaged_shards=2")
    r.count_damaged_shards([batch("b"), batch("a", "b")])
    r.count_damaged_shards([batch("a")])
    text = "sample 3 cannot be read (its CRC differs); others stand in (2 of 2 damaged shards)"
    assert lines == [f"WARNING: a: {text}", f"WARNING: b: {text}"]


def test_more_damaged_shards_than_allowed_are_named_in_an_error(make) -> None:
    r = make("data.damaged_shards=1")
    r.count_damaged_shards([batch("b")])
    with pytest.raises(RuntimeError, match=r"^2 damaged shards in /set, data.damaged_shards allows 1: a, b; run "):
        r.count_damaged_shards([batch("a")])


# ---- rollbacks ----

ILL = RunState(9, 4, history=StepHistory((1.0,), (1.0,), (0,), skipped=5, in_a_row=5, rollbacks=1))


def test_a_rollback_skips_checkpoints_from_amid_the_skipped_steps(make, lines) -> None:
    amid = found(RunState(6, history=StepHistory(skipped=1, in_a_row=2)))
    good = RunState(3, 3, history=StepHistory((1.0, 2.0), (1.0, 2.0), (0, 0)))
    back = make("guard.rollbacks=2", checkpoints=[amid, found(good)]).roll_back(ILL)
    assert (back.step, back.updates, back.history.losses) == (3, 3, (1.0, 2.0))
    assert (back.history.skipped, back.history.in_a_row, back.history.rollbacks) == (5, 0, 2)
    assert lines[0] == "keep 3"
    assert lines[1].endswith("back to step_3 with other noise and data order (2 of 2 rollbacks)")


def test_the_last_rollback_is_an_error_that_says_what_to_do(make) -> None:
    what = "the last 5 steps up to 9 were skipped, the last one because the loss is nan, after 1 rollbacks .*lower optimizer.lr"
    with pytest.raises(RuntimeError, match=what):
        make("guard.rollbacks=1", checkpoints=[found(RunState(3))]).roll_back(ILL)


def test_a_rollback_needs_a_checkpoint(make) -> None:
    with pytest.raises(RuntimeError, match="there is no checkpoint to go back to"):
        make().roll_back(ILL)
