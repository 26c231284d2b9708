"""Checkpoint: for how long training stands still while one is written in the background, and how long the writing takes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from pretrain import training
from pretrain.bench.gpu.session import NotHere, Numbers, Session
from pretrain.bench.gpu.zero import settings, trainer
from pretrain.bench.made import made_batch
from pretrain.checkpoint.reader import FOLDER
from pretrain.distributed.rendezvous import init_distributed, shutdown
from pretrain.distributed.world import World
from pretrain.models.cost import count_parameters
from pretrain.state import RunState

DEPTH = 8  # blocks: enough bytes to time, and soon written


def run(session: Session) -> None:
    """Measures a checkpoint in the background."""
    world = init_distributed()
    try:
        session.measure(f"{DEPTH} blocks, in the background", _save, world, needs=5)
    finally:
        shutdown()


def _save(session: Session, world: World) -> Numbers:
    stage, depth = ("demo_256", 2) if session.settings.small else ("stage1_256", DEPTH)
    changes = {"model.compile": "false", "checkpoint.keep_last": 2, "checkpoint.keep_every": 0}
    config, deepspeed = settings(session, world, stage, **{"model.depth": depth, **changes})
    size = 16 * count_parameters(config.model.backbone()).total
    if (free := shutil.disk_usage(session.folder).free) < 3 * size:
        raise NotHere(f"{session.folder} has {free / 1e9:.0f} GB free, {3 * size / 1e9:.0f} are needed")
    still, written = [], []
    with trainer(config, deepspeed, world) as t:
        batch, state = made_batch(config, session.lengths(2)), RunState()
        for _ in range(2):  # the first time memory is pinned on the host
            state = training.train_step(t, [batch], state)
            session.wait()
            start = time.perf_counter()
            t.saver.save(state, t.monitor.pending_sums())
            still.append(time.perf_counter() - start)
            t.saver.wait()
            written.append(time.perf_counter() - start)
            if t.saver.error:
                raise OSError(t.saver.error)
    shutil.rmtree(Path(config.run_dir) / FOLDER)
    return {
        "GB": size / 1e9,
        "stands still ms": 1e3 * still[1],
        "GB/s to the host": size / still[1] / 1e9,
        "the first time ms": 1e3 * still[0],
        "written after s": written[1],
        "GB/s written": size / written[1] / 1e9,
    }
