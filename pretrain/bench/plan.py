"""The planner's simulation against measured training steps of 1, 2 and 4 processes over gloo.

Each ingredient is measured by itself, in as many processes at once: a micro-batch's passes of a bare model, the optimizer on a
process's share, a reduction of as many buckets at once as a step has, and of next to nothing. The simulation puts them together.
Its jitter is how the processes' passes differ within a turn; what slows all of them is none. All numbers of processes take turns,
round by round, so that all meet the same load of the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pretrain import training
from pretrain.bench.made import made_batch, made_trainer
from pretrain.config import load
from pretrain.console import silence_libraries
from pretrain.distributed import torch_private
from pretrain.distributed.engine import squared_norm
from pretrain.distributed.world import World, reduce_scatter
from pretrain.loss import TrainingLoss
from pretrain.models import DiT
from pretrain.plan.simulation import Network, Work, mean_step
from pretrain.plan.work import AGREEMENTS, buckets_of
from pretrain.resilience.signals import StopRequest
from pretrain.state import RunState

STAGE, MICRO_BATCHES, IMAGES, CAPTION = "demo_256", 2, 4, 20
BUCKET = 500_000  # elements
COLUMNS = ("passes", "optimizer", "buckets", "latency", "measured", "simulated", "ratio")
SMALL = 64  # elements of a reduction that is all latency
PATIENCE = 600  # seconds for a turn; a process that fails lets the others fail then
Times = dict[str, list[float]]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of them, side by side")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of each number of processes in a round")


def run(args: argparse.Namespace) -> str:
    """The table."""
    context = multiprocessing.get_context("spawn")
    jobs: list[tuple[Any, ...]] = []
    with tempfile.TemporaryDirectory() as folder, context.Manager() as manager:
        turns = manager.Barrier(sum(args.processes), timeout=PATIENCE)
        for size in args.processes:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            jobs += [(Path(folder), rank, size, port, args, turns) for rank in range(size)]
        with context.Pool(len(jobs)) as pool:
            found = pool.starmap(_measure, jobs, chunksize=1)
            pool.close()
            pool.join()
    by_size: dict[int, list[Times]] = defaultdict(list)
    for (_, _, size, *_), times in zip(jobs, found, strict=True):
        by_size[size].append(times)
    return table(by_size)


def table(found: Mapping[int, Sequence[Times]]) -> str:
    """Measured and simulated steps, in milliseconds, of process 0; `found` has all processes of each number of them."""
    lines = [
        f"{STAGE}'s model, {MICRO_BATCHES} micro-batches of {IMAGES} images in each process; {os.cpu_count()} CPU cores; ms",
        f"  {'processes':<10}" + "".join(f"{title:>11}" for title in COLUMNS),
    ]
    for size, processes in found.items():
        middle = {name: statistics.median(values) for name, values in processes[0].items()}
        simulated = simulated_step(size, middle, jitter_of([p["passes"] for p in processes]) / MICRO_BATCHES**0.5)
        values = [middle.get(name, 0.0) for name in ("passes", "optimizer", "buckets", "latency", "step")]
        cells = "".join(f"{1e3 * value:>11.1f}" for value in [*values, simulated])
        lines.append(f"  {size:<10}{cells}{simulated / middle['step']:>11.2f}")
    return "\n".join(lines)


def jitter_of(times: Sequence[Sequence[float]]) -> float:
    """The relative standard deviation between processes at the same turn; `times` are each process's, turn by turn."""
    if len(times) == 1:
        return 0.0
    turns = zip(*times, strict=True)
    return statistics.fmean(statistics.variance(turn) / statistics.fmean(turn) ** 2 for turn in turns) ** 0.5


def simulated_step(size: int, times: Mapping[str, float], jitter: float) -> float:
    """Seconds of a step of `size` processes, from its ingredients' seconds."""
    config, _ = load(STAGE)
    shape = config.model.backbone()
    buckets = buckets_of(shape, muon=False, bucket_size=BUCKET, processes=size)
    # Those that are reduced beside one another hide their latencies.
    one = times.get("buckets", 0.0) / len(buckets)
    latency = min(times.get("latency", 0.0), one)
    through = 4 * BUCKET * (size - 1) / size
    rate = through / max(1e-9, one - latency) / 1e9 if size > 1 else 1.0
    hop = latency / max(1, size - 1)
    parameters = sum(b.size for b in buckets) / 4
    work = Work(
        micro_batches=MICRO_BATCHES,
        forward_s=times["passes"] / 3,
        backward_s=times["passes"] * 2 / 3,
        buckets=buckets,
        overlap=False,
        exchange_size=4 * parameters / size,
        optimizer_s=times["optimizer"],
        gather_size=4 * parameters,
        agreements=AGREEMENTS,
        jitter=jitter,
    )
    return mean_step(work, Network(size, rate, rate, hop, hop), size).total


# ---- in each process ----


def _measure(folder: Path, rank: int, size: int, port: int, args: argparse.Namespace, turns: Any) -> Times:
    """Seconds of one process of a world of `size`; all worlds take turns."""
    silence_libraries()
    torch.set_num_threads(1)
    from pretrain.distributed.rendezvous import init_distributed, shutdown  # late: deepspeed has been told to be silent

    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in launch.items()} | {"MASTER_ADDR": "127.0.0.1"}
    world = init_distributed()
    try:
        return _take_turns(folder, world, args, turns)
    finally:
        shutdown()


def _take_turns(folder: Path, world: World, args: argparse.Namespace, turns: Any) -> Times:
    """Measures ingredients and steps whenever it is this world's turn."""
    words = {
        "run_dir": folder / str(world.size),
        "data.path": "not/read",
        "preview.every": 0,
        "logging.every": 1_000_000,
        "steps": 1_000_000,
        "logging.peak_tflops": 1,
        "optimizer.name": "adamw",
        "deepspeed.train_batch_size": world.size * MICRO_BATCHES * IMAGES,
        "deepspeed.train_micro_batch_size_per_gpu": IMAGES,
        "deepspeed.zero_optimization.overlap_comm": "false",
        "deepspeed.zero_optimization.reduce_bucket_size": BUCKET,
    }
    config, deepspeed = load(STAGE, [f"{key}={value}" for key, value in words.items()])
    times: Times = defaultdict(list)
    with closing(StopRequest()) as stop:
        t = made_trainer(config, deepspeed | {"gradient_accumulation_steps": MICRO_BATCHES}, world, stop)
        with closing(t.watchdog), closing(t.monitor):
            batch, state = made_batch(config, [CAPTION] * IMAGES), RunState()
            ingredients = _ingredients(t, batch, world)
            for number in range(args.rounds + 1):  # the first round does not count
                for turn in args.processes:
                    turns.wait()
                    for _ in range(args.steps if turn == world.size else 0):
                        for name, work in ingredients.items():
                            seconds = _timed(work)
                            times[name] += [seconds] if number else []
                        begin = time.perf_counter()
                        state = training.train_step(t, [batch] * MICRO_BATCHES, state)
                        times["step"] += [time.perf_counter() - begin] if number else []
                    turns.wait()
    return dict(times)


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _ingredients(t: training.Trainer, batch: Any, world: World) -> dict[str, Callable[[], object]]:
    """What a step is made of, each by itself."""
    model = DiT(t.model.config)
    plain: Any = SimpleNamespace(world=world, module=model, dtype=torch.float32, forward=model)
    loss = TrainingLoss(t.config, plain, t.config.objective.build(), t.monitor)
    plan = loss.plan(0)

    def passes() -> None:
        model.zero_grad(set_to_none=True)
        loss.compute(batch.to(world.device, torch.float32), plan).mean.backward()

    shares = [torch.zeros_like(m).requires_grad_() for m in t.engine.masters]
    for share in shares:
        share.grad = torch.ones_like(share)
    averages = [torch.zeros_like(s, requires_grad=False) for s in shares]
    optimizer = torch.optim.AdamW(shares, lr=1e-4)

    def update() -> None:
        gradients = [s.grad for s in shares if s.grad is not None]
        squared_norm(gradients, world.device)
        for gradient in gradients:
            gradient.mul_(1.0)
        optimizer.step()
        torch_private.lerp_(averages, [s.detach() for s in shares], 0.5)

    found: dict[str, Callable[[], object]] = {"passes": passes, "optimizer": update}
    if world.size > 1:
        in_a_step = buckets_of(t.model.config, muon=False, bucket_size=BUCKET, processes=world.size)
        buckets, small = [torch.ones(BUCKET) for _ in in_a_step], torch.ones(SMALL)

        def reduce() -> None:
            for wait in [reduce_scatter(bucket, world) for bucket in buckets]:
                wait()

        found["buckets"] = reduce
        found["latency"] = lambda: reduce_scatter(small, world)()
    return found
