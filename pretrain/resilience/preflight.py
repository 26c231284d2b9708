"""Preflight: checks all that a training needs before GPU time is spent, and lists every problem of all processes.

    python -m pretrain.train CONFIG [section.key=value ...] --check [--processes N]

Every training does these checks when it starts; `--check` prints what is right and wrong, and trains nothing. Without a
launcher (on a login node) it also lists what cannot be checked there. A problem is a line: the place, what was found, what
is needed, and the mend.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data_prep import schema
from data_prep.common.words import counted
from pretrain.config import Config, ConfigError, geometry, load
from pretrain.data.epoch_plan import plan_epochs
from pretrain.data.held_out import held_out_shards, samples_by_set, sets_read
from pretrain.data.loader import check_fits, fingerprint, order_settings
from pretrain.data.location import DataLocation, open_card, read_indexes
from pretrain.data.shard_check import check_shards
from pretrain.data.shared_memory import remove_stale_names
from pretrain.distributed.world import World, all_gather, all_reduce, barrier
from pretrain.fp8 import fp8_problems
from pretrain.resilience.capacity import (
    activation_bytes,
    cache_problems,
    gib,
    kept_checkpoint_bytes,
    memory_problems,
    run_dir_problems,
    shared_memory_problems,
    state_bytes,
)
from pretrain.resilience.failure import report_failure
from pretrain.resilience.node_checks import node_problems, raise_open_files
from pretrain.resilience.run_lock import lock_problems
from pretrain.resilience.start_checks import start_problems

MAX_CLOCK_SKEW = 10.0  # seconds; ages of files are compared over nodes


@dataclass
class Report:
    """Results of the checks, a line each: passed, problems, and names of those that cannot be done here."""

    passed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"  ok       {line}" for line in self.passed]
        lines += [f"  problem  {line}" for line in self.problems]
        lines += [f"  not checked here: {', '.join(self.unchecked)}"] if self.unchecked else []
        return "\n".join(line.replace("\n", "\n           ") for line in lines)


# ---- entry points ----


def check(name: str, overrides: list[str], processes: int | None) -> int:
    """The command `--check`: prints the report. Returns 0 without a problem, else 1."""
    try:
        raise_open_files()
        report = _check(name, overrides, processes)
    except Exception as error:
        return report_failure(error, None)
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: {counted(len(report.problems), 'problem')}\n{report}", flush=True)
    return 1 if report.problems else 0


def _check(name: str, overrides: list[str], processes: int | None) -> Report:
    """The report of the command `--check`, on all processes of a launcher or without one."""
    try:
        config, deepspeed = load(name, overrides)
    except ConfigError as error:
        first, *rest = str(error).splitlines()
        return Report(problems=[f"config: {line.strip()}" for line in rest or [first]])
    if "RANK" in os.environ:
        from pretrain.distributed.rendezvous import init_distributed, shutdown  # late: imports DeepSpeed

        try:
            return preflight(config, deepspeed, init_distributed())
        finally:
            shutdown()
    return check_without_launcher(config, deepspeed, processes)


def require(config: Config, deepspeed: dict[str, Any], world: World) -> None:
    """Checks at a training's start; the shards are left to the loader.

    Raises:
        ValueError: there are problems; process 0 has printed those of all processes.
    """
    report = preflight(config, deepspeed, world, every_shard=False)
    if not report.problems:
        return
    if world.rank == 0:
        print(Report(problems=report.problems), file=sys.stderr, flush=True)
    barrier(world)  # the first process that ends may have the others killed
    raise ValueError(f"not started: process 0 lists what is wrong ({counted(len(report.problems), 'problem')})")


def preflight(config: Config, deepspeed: dict[str, Any], world: World, every_shard: bool = True) -> Report:
    """Checks on all processes of a started group; the report is the same on all of them.

    Args:
        every_shard: check each shard of the data set, not only its description: indexes are read.
    """
    mine = Report()
    if every_shard and world.rank == 0:  # a training takes the lock itself
        mine.problems += lock_problems(config.run_dir)
    _batch(mine, deepspeed, world.size)
    if int(os.environ["LOCAL_RANK"]) == 0:
        card, order = _data(mine, config, deepspeed, DataLocation.of(config.data), every_shard)
        mine.problems += start_problems(config, order)
        _run_dir(mine, config)
        removed = remove_stale_names()
        mine.passed.append(f"/dev/shm: {removed} stale bytes of killed runs removed")
        if card is not None:
            samples = int(os.environ["LOCAL_WORLD_SIZE"]) * (deepspeed["train_batch_size"] // world.size)
            mine.problems += shared_memory_problems(Path("/dev/shm"), config, card, samples)
            mine.problems += cache_problems(config, card)
        mine.problems += node_problems(config, deepspeed, world.size, cuda=world.device.type == "cuda")
    if config.model.fp8:
        mine.problems += fp8_problems(config.model.fp8, deepspeed, config.model.compile, world.device)
    if world.device.type == "cuda":
        there = torch.cuda.get_device_properties(world.device).total_memory
        mine.problems += memory_problems(config, deepspeed, world.size, there)
    if world.size > 1:
        _all_reduce(mine, world)
    return _combine(mine, config, deepspeed, world)


def check_without_launcher(config: Config, deepspeed: dict[str, Any], processes: int | None) -> Report:
    """Checks without the stage's nodes; `processes` is the planned number of them."""
    report = Report()
    if processes is not None:
        _batch(report, deepspeed, processes)
    place = DataLocation.of(config.data)
    with tempfile.TemporaryDirectory() as folder:  # the cache is for the nodes' own disks
        place = replace(place, root=Path(folder)) if place.cached else place
        _, order = _data(report, config, deepspeed, place, every_shard=True)
    report.problems += [*start_problems(config, order), *lock_problems(config.run_dir)]
    _run_dir(report, config)
    if config.model.fp8:
        report.problems += fp8_problems(config.model.fp8, deepspeed, config.model.compile, None)
    report.problems += port_problems(int(os.environ.get("MASTER_PORT", 0)))
    report.unchecked += [
        "GPUs",
        "/dev/shm",
        "the data cache",
        "the nodes' compilers and limits",
        "clocks",
        "the network",
    ]
    report.unchecked += ["the batch (give --processes N)"] if processes is None else []
    return report


# ---- checks of one process ----


def _batch(report: Report, deepspeed: dict[str, Any], processes: int) -> None:
    """Checks that the processes divide the global batch."""
    try:
        steps = geometry(deepspeed, processes)
    except ConfigError as error:
        report.problems.append(f"batch: {error}")
    else:
        micro = deepspeed["train_micro_batch_size_per_gpu"]
        parts = f"{counted(processes, 'process', 'processes')} × {counted(steps, 'micro-batch', 'micro-batches')} of {micro}"
        report.passed.append(f"batch: {deepspeed['train_batch_size']} images = {parts}")


def _data(
    report: Report, config: Config, deepspeed: dict[str, Any], place: DataLocation, every_shard: bool
) -> tuple[schema.Card | None, dict[str, Any] | None]:
    """Checks the data set, without a collective.

    Returns:
        Its card, and the loader's fingerprint, of which less is known without `every_shard`: both None where the data set
        cannot be trained on.
    """
    batch = deepspeed["train_batch_size"]
    try:
        card = open_card(place, World.alone())
        check_fits(card, config, config.model.backbone(), batch)
        sets = sets_read(card, config.data)
        if every_shard:
            indexes = read_indexes(place, sets, World.alone())
            missing = check_shards(place, indexes, config.data.damaged_shards, World.alone())
            drawn = plan_epochs(card, config, batch, samples_by_set(held_out_shards(indexes, config.data)))
            order = fingerprint(config, card, indexes, drawn, batch)
        else:
            missing, drawn = [], plan_epochs(card, config, batch, {})
            order = order_settings(config, card, batch)
    except (ValueError, OSError) as error:
        report.problems.append(f"data: {error}")
        return None, None
    count = sum(drawn.draws.values())
    report.passed.append(
        f"data: {place.origin}, {counted(count, 'sample')} an epoch in {counted(len(drawn.sets), 'set')}"
    )
    report.passed += [*drawn.notes, *missing]
    return card, order


def _run_dir(report: Report, config: Config) -> None:
    """Checks the disk of the run directory."""
    problems = run_dir_problems(config)
    report.problems += problems
    if not problems:
        report.passed.append(f"run_dir: {config.run_dir}, checkpoints take up to {gib(kept_checkpoint_bytes(config))}")


def port_problems(port: int) -> list[str]:
    """A problem where the rendezvous cannot listen on a port of this host; 0 is any free one."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError as error:
            return [f"MASTER_PORT: {port} cannot be had on {socket.gethostname()} ({error.strerror}); give another one"]
    return []


# ---- checks of all processes together ----


def _all_reduce(report: Report, world: World) -> None:
    """Sums numbers over all processes: checks the result, and reports the speed."""
    count = 1 << (24 if world.device.type == "cuda" else 20)
    for _ in range(2):  # the first sum connects the processes
        values = torch.full((count,), world.rank + 1.0, device=world.device)
        begin = time.perf_counter()
        all_reduce(values, world)
        low, high = values.min().item(), values.max().item()  # waits for it
        seconds = time.perf_counter() - begin
    expected = world.size * (world.size + 1) / 2
    if (low, high) != (expected, expected):
        report.problems.append(
            f"network: a sum over all processes gave {low:g} to {high:g}, not {expected:g}; take these nodes out and test them"
        )
    report.passed.append(
        f"network: {4 * count >> 20} MiB summed over {world.size} processes in {1000 * seconds:.1f} ms "
        f"({4 * count / seconds / 1e9:.2f} GB/s)"
    )


@dataclass(frozen=True)
class ProcessReport:
    """Facts and problems of one process, for a comparison with the others; `clock` is its time in seconds."""

    host: str
    clock: float
    gpu: str
    problems: tuple[str, ...]


def _combine(mine: Report, config: Config, deepspeed: dict[str, Any], world: World) -> Report:
    """The problems of all processes, each once, and those that only a comparison shows."""
    cuda = world.device.type == "cuda"
    gpu = torch.cuda.get_device_name(world.device) if cuda else "none"
    barrier(world)
    reports = all_gather(ProcessReport(socket.gethostname(), time.time(), gpu, tuple(mine.problems)), world)
    report = Report(mine.passed, [*merged(reports), *clock_problems(reports), *gpu_problems(reports)])
    report.passed.append(f"GPUs: {world.size} × {gpu}" if cuda else "GPUs: none; training runs on the CPUs")
    if cuda:
        micro = deepspeed["train_micro_batch_size_per_gpu"]
        states, activations = state_bytes(config, deepspeed, world.size), activation_bytes(config, micro)
        report.passed.append(
            f"GPU memory: {gib(states)} of states, some {gib(activations)} of activations (an estimate)"
        )
    return report


def merged(reports: list[ProcessReport]) -> list[str]:
    """Every problem once, with the hosts that have it, unless all do."""
    hosts = {report.host for report in reports}
    having: dict[str, dict[str, None]] = {}
    for report in reports:
        for problem in report.problems:
            having.setdefault(problem, {})[report.host] = None
    return [p if len(on) == len(hosts) else f"{p} (on {', '.join(on)})" for p, on in having.items()]


def clock_problems(reports: list[ProcessReport]) -> list[str]:
    """A problem where two processes' clocks are further apart than MAX_CLOCK_SKEW."""
    first, last = min(reports, key=lambda r: r.clock), max(reports, key=lambda r: r.clock)
    apart = last.clock - first.clock
    if apart <= MAX_CLOCK_SKEW:
        return []
    allowed = f"{MAX_CLOCK_SKEW:.0f} s are allowed, as ages of files are compared; set them by NTP"
    return [f"clocks: {last.host} is {apart:.0f} s ahead of {first.host}, {allowed}"]


def gpu_problems(reports: list[ProcessReport]) -> list[str]:
    """A problem where the processes have GPUs of several kinds."""
    kinds: dict[str, dict[str, None]] = {}
    for report in reports:
        kinds.setdefault(report.gpu, {})[report.host] = None
    if len(kinds) == 1:
        return []
    listed = "; ".join(f"{gpu} on {', '.join(hosts)}" for gpu, hosts in kinds.items())
    return [f"GPUs: not all alike ({listed}): every step would wait for the slowest; take nodes of one kind"]
