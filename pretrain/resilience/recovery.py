"""Recovery: where a run begins, its checkpoints, and how it goes on after skipped steps and damaged shards.

    start                    the run's newest intact checkpoint, else another run's weights (init_from), else fresh weights
    batches                  the data from there on
    save                     a checkpoint, in the background if asked
    report_skipped_step      a skipped step in the log and in RUN/skipped_steps.jsonl
    count_damaged_shards     a budget of damaged shards (data.damaged_shards)
    roll_back                the last good checkpoint after guard.patience skipped steps in a row; noise and data order change

All processes call each of these at the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from data_prep.common.words import counted
from pretrain.checkpoint import reader as checkpoint
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.restore import restore_weights, resume
from pretrain.checkpoint.writer import CheckpointWriter
from pretrain.config import Config, upgrade
from pretrain.data.batch import Batch
from pretrain.data.held_out import was_trained_on
from pretrain.data.loader import Loader
from pretrain.distributed.ema import Ema
from pretrain.distributed.engine import Engine
from pretrain.distributed.world import all_gather, barrier
from pretrain.monitoring.monitor import Monitor
from pretrain.resilience.requeue import record_start
from pretrain.resilience.run_lock import RunLock
from pretrain.resilience.spike_guard import SKIPPED, SpikeGuard
from pretrain.resilience.watchdog import Watchdog
from pretrain.state import RunState


@dataclass(frozen=True)
class Recovery:
    """The parts of a training that are restored when it starts or rolls back.

    Attributes:
        log: prints a line, on process 0.
        damaged: shards that proved damaged since the start.
    """

    config: Config
    loader: Loader
    engine: Engine
    ema: Ema
    guard: SpikeGuard
    watchdog: Watchdog
    monitor: Monitor
    saver: CheckpointWriter
    lock: RunLock
    log: Callable[[str], None]
    damaged: set[str] = field(default_factory=set)

    def start(self) -> RunState:
        """Restores the run's newest intact checkpoint; a run without one starts from `init_from`, or from fresh weights.

        Raises:
            ValueError: every checkpoint is damaged, one does not fit the config, or `init_from` has none.
        """
        if own := checkpoint.newest_intact(self.config.run_dir, self.engine.world, self.log):
            state = self._restore(own)
            p = state.position
            self.log(f"going on from {own.path}: step {state.step}, epoch {p.epoch}, its step {p.step_in_epoch}")
            self._log_changes(own)
            return state
        self.monitor.resume(0, [])
        if self.config.init_from is None:
            self.log(f"starting {self.config.name} from nothing")
            return RunState()
        return self._start_from(self.config.init_from)

    def _start_from(self, run: str) -> RunState:
        """Takes over another run's weights and average, and with `carry_moments` the optimizer's moments."""
        config = self.config
        other = checkpoint.newest_intact(checkpoint.find_run(run), self.engine.world, self.log)
        if other is None:
            raise ValueError(f"init_from: {run} has no complete checkpoint yet; train it first")
        steps = other.state["config"]["steps"]
        if other.run_state.step < steps:
            done = f"{other.run_state.step} of its {steps} steps"
            self.log(f"WARNING: {run} is not finished: it has {done}")
        origins = restore_weights(other, self.engine, self.ema, moments=config.carry_moments)
        moments = "the optimizer's moments too" if config.carry_moments else "fresh optimizer moments"
        self.log(f"starting {config.name} from {other.path}: its weights and average, {moments}, data from the start")
        self._log_changes(other)
        for line in origins:
            self.log(f"  {line}")
        if was_trained_on(config.data, other.state["config"]["data"]):
            self.log(
                f"WARNING: {run} was trained on samples that data.validation holds out here; give it the same there"
            )
        return RunState(updates=other.run_state.updates if config.carry_moments else 0)

    def _log_changes(self, before: Checkpoint) -> None:
        """Logs each setting that is another one than in a checkpoint's run: old → new."""
        there = {**before.state, "config": upgrade(before.state["config"])}
        for line in checkpoint.config_changes(there, self.saver.run_info):
            self.log(f"  {line}")

    def record_start(self, step: int) -> None:
        """Records this start of a SLURM job. Raises RuntimeError on all processes where the job makes no progress."""
        problem = None
        if self.engine.world.rank == 0:
            try:
                record_start(self.config.run_dir, step, complete=step >= self.config.steps)
            except RuntimeError as error:
                problem = str(error)
        if problem := all_gather(problem, self.engine.world)[0]:
            raise RuntimeError(problem)

    def batches(self, state: RunState) -> Iterator[list[Batch]]:
        """Yields each step's micro-batches from a state on; the monitor learns how long training waited for them."""
        self.loader.resume(state.position, state.history.rollbacks)
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            self.watchdog.begin("reading data")
            batch = next(batches)
            self.monitor.add_data_wait(time.perf_counter() - start)
            yield batch

    def save(self, state: RunState, wait: bool) -> None:
        """Starts a checkpoint, once the one before is finished; its time does not count into the training's speed.

        Args:
            wait: return when it is finished on all processes.

        Raises:
            RuntimeError: with `wait`, the checkpoint could not be written; else that is a warning in the log. Or another training
            has taken over the run directory.
        """
        self.watchdog.begin("writing a checkpoint")
        self.lock.require()
        with self.monitor.paused():
            start = time.perf_counter()
            self.saver.wait()
            self.log_saved()
            self.saver.save(state, self.monitor.pending_sums())
            self.monitor.record_checkpoint_pause(state.step, time.perf_counter() - start)
            if wait:
                self.saver.wait()
                barrier(self.engine.world)
        if wait and self.saver.error:
            raise RuntimeError(self.saver.error)

    def log_saved(self) -> None:
        """Logs the last checkpoint, or why it could not be written; once, when that is known."""
        if line := self.saver.report():
            self.log(line)

    def report_skipped_step(self, state: RunState) -> None:
        """Logs the step that was just skipped, and lists it with its samples."""
        self.guard.record_skipped(self.config.run_dir, state.step)
        history, file = state.history, self.config.run_dir / SKIPPED
        so_far = f"{history.in_a_row} in a row, {history.skipped} in all"
        fault = self.guard.verdict.fault
        self.log(f"WARNING: step {state.step} was skipped: {fault} ({so_far}; its samples: {file})")

    def count_damaged_shards(self, batches: list[Batch]) -> None:
        """Logs the shards that proved damaged in this step on any process.

        Raises:
            RuntimeError: more than `data.damaged_shards` are damaged.
        """
        own = {d.shard: d for batch in reversed(batches) for d in reversed(batch.damaged)}
        everyone = all_gather(own, self.engine.world)
        new = {shard: d for found in everyone for shard, d in found.items() if shard not in self.damaged}
        self.damaged.update(new)
        count, limit = len(self.damaged), self.config.data.damaged_shards
        for shard, d in sorted(new.items()):
            what = f"sample {d.sample} cannot be read ({d.reason}); others stand in"
            self.log(f"WARNING: {shard}: {what} ({count} of {limit} damaged shards)")
        if count > limit:
            raise RuntimeError(
                f"{counted(count, 'damaged shard')} in {self.config.data.path}, data.damaged_shards allows {limit}: "
                f"{', '.join(sorted(self.damaged))}; run data_prep/verify.py --repair on the data set"
            )

    def roll_back(self, state: RunState) -> RunState:
        """Restores the last checkpoint before the skipped steps; noise and data order differ from there on.

        Raises:
            RuntimeError: there is no such checkpoint, or `guard.rollbacks` is reached.
        """
        config, history = self.config, state.history
        limit, fault = config.guard.rollbacks, self.guard.verdict.fault
        what = f"the last {history.in_a_row} steps up to {state.step} were skipped, the last one because {fault}"
        where = f"Their samples and losses: {config.run_dir / SKIPPED}"
        if history.rollbacks >= limit:
            raise RuntimeError(
                f"{what}, after {history.rollbacks} rollbacks (guard.rollbacks is {limit}). {where}. Look at the data they "
                "name and at the loss curve, lower optimizer.lr, or start from an older checkpoint by removing the newer ones"
            )
        self.saver.wait()
        good = checkpoint.newest_intact(config.run_dir, self.engine.world, self.log, _before_skipped_steps)
        if good is None:
            raise RuntimeError(f"{what}, and there is no checkpoint to go back to. {where}")
        back = self._restore(good)
        kept = replace(back.history, skipped=history.skipped, rollbacks=history.rollbacks + 1)
        count = f"{kept.rollbacks} of {limit} rollbacks"
        self.log(f"WARNING: {what}; back to {good.path} with other noise and data order ({count})")
        return replace(back, history=kept)

    def _restore(self, own: Checkpoint) -> RunState:
        """Puts one of the run's own checkpoints back on all processes; those of later steps are set aside."""
        checkpoint.set_aside_later(self.config.run_dir, own.run_state.step, self.engine.world)
        state = resume(own, self.engine, self.ema, self.loader.fingerprint)
        self.monitor.resume(state.step, own.pending_sums(self.engine.world))
        return state


def _before_skipped_steps(found: Checkpoint) -> bool:
    return found.run_state.history.in_a_row == 0
