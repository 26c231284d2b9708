"""Parts that the tests of checkpoints share: a real engine, its average, and a writer into a fresh folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines import engine_of, one_process, tiny, train_steps

from pretrain.checkpoint.reader import Checkpoint, newest
from pretrain.checkpoint.writer import CheckpointWriter
from pretrain.config import OptimizerSection, load
from pretrain.distributed.ema import Ema
from pretrain.distributed.engine import Engine
from pretrain.distributed.world import World
from pretrain.state import DataPosition, RunState, StepHistory

RUN_INFO = {"config": {"steps": 10, "optimizer": {"lr": 0.1}}, "data": {"seed": 3, "draws": {"a/256": 8}}}
HISTORY = StepHistory(losses=(1.0, 0.5), norms=(2.0, 1.5), groups=(0, 1), skipped=2, in_a_row=1, rollbacks=1)


@dataclass
class Run:
    """A run of a tiny model."""

    folder: Path
    engine: Engine
    ema: Ema
    writer: CheckpointWriter

    def save(self, step: int, pending_sums: list[float] | None = None, **state: Any) -> Checkpoint:
        """Writes a checkpoint of this step, and reads it."""
        run_state = RunState(step, self.engine.updates, 4 * step, DataPosition(1, step), HISTORY)
        self.writer.save(run_state, pending_sums or [1.0, 2.0])
        self.writer.wait()
        assert self.writer.error is None
        found = newest(self.folder)
        assert found is not None
        return found

    def train(self, *steps: int) -> None:
        for step in steps:
            train_steps(self.engine, range(step, step + 1))
            self.ema.update(step)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with one_process() as world:
        yield world


@pytest.fixture
def make_run(world: World, tmp_path: Path) -> Callable[..., Run]:
    """Makes a run in a folder of its own; `settings` are those of the section `checkpoint`."""

    def make(
        name: str = "run",
        seed: int = 0,
        engine: Engine | None = None,
        more_averages: tuple[float, ...] = (),
        **settings: Any,
    ) -> Run:
        words = [f"checkpoint.{key}={value}" for key, value in settings.items()]
        config = load("demo_256", [f"run_dir={tmp_path / name}", "data.path=/set", *words])[0]
        engine = engine or engine_of(world, tiny(seed), bf16={"enabled": True})
        ema = Ema(engine, OptimizerSection(ema_decay=0.9, more_ema_decays=more_averages))
        return Run(config.run_dir, engine, ema, CheckpointWriter(config, engine, ema, RUN_INFO))

    return make
