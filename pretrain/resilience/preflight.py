"""What is looked at before any GPU time is spent: all that is wrong, from all processes, in one list.

    python -m pretrain.train CONFIG [section.key=value ...] --check [--processes N]

Every training looks at it when it starts; `--check` prints what was found, good or bad, and trains nothing. Without a
launcher (a login node) it says what it could not see there. A problem is a line: where, what was found, what is needed,
and how to mend it.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from math import lcm
from pathlib import Path
from typing import Any

import torch

from data_prep import schema as shards
from pretrain.checkpoint.reader import FOLDER
from pretrain.config import Config, ConfigError, geometry, load
from pretrain.data.epoch_plan import plan_epoch
from pretrain.data.loader import check_fits
from pretrain.data.location import DataLocation, open_card, prepare
from pretrain.data.shared_memory import remove_stale_names
from pretrain.distributed.rendezvous import init_distributed
from pretrain.distributed.world import World, all_gather, all_reduce, barrier
from pretrain.models.cost import CAPTION, count_activations, count_parameters, grid_of

GIB = 1 << 30
MOST_SKEW = 10.0  # seconds; ages of files are compared over nodes
UNITS = {"mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}  # of data.cache_limit, as streaming reads them


@dataclass
class Report:
    """What was found as it should be, what is wrong, and what could not be seen."""

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"  ok       {fact}" for fact in self.facts]
        lines += [f"  problem  {problem}" for problem in self.problems]
        lines += [f"  not looked at here: {', '.join(self.unseen)}"] if self.unseen else []
        return "\n".join(line.replace("\n", "\n           ") for line in lines)


# ---- the ways in ----


def check(name: str, overrides: list[str], processes: int | None) -> int:
    """`--check`: prints what was found; 0 where nothing is wrong, else 1."""
    try:
        config, deepspeed = load(name, overrides)
    except ConfigError as error:
        first, *rest = str(error).splitlines()
        report = Report(problems=[f"config: {line.strip()}" for line in rest or [first]])
    else:
        report = (
            preflight(config, deepspeed, init_distributed())
            if "RANK" in os.environ
            else alone(config, deepspeed, processes)
        )
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: {len(report.problems)} problems\n{report}", flush=True)
    return 1 if report.problems else 0


def require(config: Config, deepspeed: dict[str, Any], world: World) -> None:
    """At a start: process 0 prints the problems of all, and each raises ValueError. The loader looks at the shards itself."""
    report = preflight(config, deepspeed, world, every_shard=False)
    if not report.problems:
        return
    if world.rank == 0:
        print(Report(problems=report.problems), file=sys.stderr, flush=True)
    barrier(world)  # the first process that ends may have the others killed
    raise ValueError(f"not started: process 0 tells what is wrong ({len(report.problems)})")


def preflight(config: Config, deepspeed: dict[str, Any], world: World, every_shard: bool = True) -> Report:
    """What the processes of a started group find together; the same on all of them."""
    mine = Report()
    _batch(mine, deepspeed, world.size)
    if int(os.environ["LOCAL_RANK"]) == 0:
        card = _data(mine, config, deepspeed, DataLocation.of(config.data), every_shard)
        _disks(mine, config)
        if card is not None:
            samples = int(os.environ["LOCAL_WORLD_SIZE"]) * (deepspeed["train_batch_size"] // world.size)
            mine.problems += shared_memory_problems(Path("/dev/shm"), config, card, samples)
            mine.problems += cache_problems(config, card)
    if world.device.type == "cuda":
        there = torch.cuda.get_device_properties(world.device).total_memory
        mine.problems += memory_problems(config, deepspeed, world.size, there)
    if world.size > 1:
        _all_reduce(mine, world)
    return _together(mine, config, deepspeed, world)


def alone(config: Config, deepspeed: dict[str, Any], processes: int | None) -> Report:
    """What can be known of a stage without its nodes; `processes` are those that it shall have."""
    report = Report()
    if processes is not None:
        _batch(report, deepspeed, processes)
    place = DataLocation.of(config.data)
    with tempfile.TemporaryDirectory() as folder:  # the cache is for the nodes' own disks
        _data(report, config, deepspeed, replace(place, root=Path(folder)) if place.cached else place, every_shard=True)
    _disks(report, config)
    report.problems += port_problems(int(os.environ.get("MASTER_PORT", 0)))
    report.unseen += ["GPUs", "/dev/shm", "the data cache", "clocks", "the network"]
    report.unseen += ["the batch (give --processes N)"] if processes is None else []
    return report


# ---- what one process sees ----


def _batch(report: Report, deepspeed: dict[str, Any], processes: int) -> None:
    try:
        steps = geometry(deepspeed, processes)
    except ConfigError as error:
        report.problems.append(f"batch: {error}")
    else:
        micro = deepspeed["train_micro_batch_size_per_gpu"]
        report.facts.append(
            f"batch: {deepspeed['train_batch_size']} images = {processes} processes × {steps} micro-batches of {micro}"
        )


def _data(
    report: Report, config: Config, deepspeed: dict[str, Any], place: DataLocation, every_shard: bool
) -> shards.Card | None:
    """The card, None where the data set cannot be trained on. As in one process: what follows is for all to hear."""
    batch = deepspeed["train_batch_size"]
    try:
        card = open_card(place, World.alone())
        check_fits(card, config, config.model.backbone(), batch)
        drawn = plan_epoch(card, config.data, batch)
        missing = prepare(place, drawn.draws, config.data.damaged_shards, World.alone()) if every_shard else []
    except (ValueError, OSError) as error:
        report.problems.append(f"data: {error}")
        return None
    count = sum(drawn.draws.values())
    report.facts.append(f"data: {place.origin}, {count} samples an epoch in {len(drawn.draws)} sets")
    report.facts += [*drawn.notes, *missing]
    return card


def _disks(report: Report, config: Config) -> None:
    report.problems += run_dir_problems(config)
    report.facts.append(f"run_dir: {config.run_dir}, checkpoints take up to {_gib(checkpoint_bytes(config))}")
    removed = remove_stale_names()
    report.facts.append(f"/dev/shm: {removed} stale bytes of killed runs removed")


def checkpoint_bytes(config: Config) -> int:
    """The most that a run's checkpoints take: the newest, those kept for ever, and the one that is being written."""
    keep = config.checkpoint
    for_ever = config.steps // lcm(keep.every, keep.keep_every) if keep.keep_every else 0
    return 16 * count_parameters(config.model.backbone()).total * (keep.keep_last + for_ever + 1)


def run_dir_problems(config: Config) -> list[str]:
    there = sum(_bytes_in(folder) for folder in (config.run_dir / FOLDER).glob("step_*"))
    needed = checkpoint_bytes(config) - there
    return disk_problems(
        "run_dir", config.run_dir, needed, "for its checkpoints; free some, or keep fewer (checkpoint)"
    )


def cache_problems(config: Config, card: shards.Card) -> list[str]:
    """Whether the disk of the data cache holds what the cache may grow to."""
    cache, limit = config.data.cache, config.data.cache_limit
    if cache is None:
        return []
    most = sum(about["bytes"] for about in card.sets_with(config.data.resolution).values())
    if limit is not None:
        most = min(most, int(float(limit[:-2]) * UNITS[limit[-2:]]))
    needed = most - _bytes_in(DataLocation.of(config.data).root)
    return disk_problems("data.cache", cache, needed, "for the data set's shards; free some, or lower data.cache_limit")


def shared_memory_problems(folder: Path, config: Config, card: shards.Card, samples: int) -> list[str]:
    """Whether a node's loaders can keep their batches ready: `samples` of a step on this node, captions at their cap."""
    data = config.data
    side, kinds = data.resolution // card.vae["downsample"], 2 if card.posterior == "mean_std" else 1
    sample = 2 * (kinds * card.vae["channels"] * side**2 + card.token_cap * card.text_encoder["width"])
    mend = "for the batches kept ready; mount it larger (--shm-size), or lower data.workers or data.prefetch"
    return disk_problems("shared memory", folder, data.workers * data.prefetch * samples * sample, mend)


def disk_problems(what: str, folder: Path, needed: int, why: str) -> list[str]:
    """Whether a folder, there or not yet, can take `needed` bytes more."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return [f"{what}: {folder} cannot be written, as {there} {'may not be' if there.is_dir() else 'is no folder'}"]
    free = shutil.disk_usage(there).free
    return [f"{what}: {folder} has {_gib(free)} free, {_gib(needed)} are needed {why}"] if free < needed else []


def port_problems(port: int) -> list[str]:
    """Whether the rendezvous can listen here; 0 is any free port."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError as error:
            return [f"MASTER_PORT: {port} cannot be had on {socket.gethostname()} ({error.strerror}); give another one"]
    return []


def memory_problems(config: Config, deepspeed: dict[str, Any], processes: int, there: int) -> list[str]:
    """Whether what must be on a GPU of `there` bytes fits: a lower bound, without activations and buffers."""
    states = state_bytes(config, deepspeed, processes)
    if states <= there:
        return []
    more = "take more processes, or GPUs with more memory"
    needed = f"weights, gradients and AdamW's state alone take {_gib(states)} with {processes} processes"
    return [f"GPU memory: {_gib(there)} on a GPU, but {needed}; {more}"]


def state_bytes(config: Config, deepspeed: dict[str, Any], processes: int) -> int:
    """Of ZeRO-2 on each GPU: all weights, and its share of the gradients, masters, both moments and the average in fp32."""
    weight = 2 if deepspeed.get("bf16", {}).get("enabled") else 4
    return count_parameters(config.model.backbone()).total * (weight * processes + 20) // processes


def activation_bytes(config: Config, micro: int) -> int:
    """About what a micro-batch keeps for its backward pass, in bf16, with captions of some length."""
    c = config.model.backbone()
    grid = grid_of(c, config.data.resolution)
    return round(micro * count_activations(c, grid, CAPTION, recompute=config.model.recompute))


# ---- what all of them see together ----


def _all_reduce(report: Report, world: World) -> None:
    count = 1 << (24 if world.device.type == "cuda" else 20)
    for _ in range(2):  # the first one connects
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
    report.facts.append(
        f"network: {4 * count >> 20} MiB summed over {world.size} processes in {1000 * seconds:.1f} ms "
        f"({4 * count / seconds / 1e9:.2f} GB/s)"
    )


@dataclass(frozen=True)
class Seen:
    """What one process tells the others."""

    host: str
    clock: float
    gpu: str
    problems: tuple[str, ...]


def _together(mine: Report, config: Config, deepspeed: dict[str, Any], world: World) -> Report:
    """The problems of all processes, each once, and what only a comparison shows."""
    cuda = world.device.type == "cuda"
    gpu = torch.cuda.get_device_name(world.device) if cuda else "none"
    barrier(world)
    seen = all_gather(Seen(socket.gethostname(), time.time(), gpu, tuple(mine.problems)), world)
    report = Report(mine.facts, [*merged(seen), *clock_problems(seen), *gpu_problems(seen)])
    report.facts.append(f"GPUs: {world.size} × {gpu}" if cuda else "GPUs: none; training runs on the CPUs")
    if cuda:
        micro = deepspeed["train_micro_batch_size_per_gpu"]
        states, activations = state_bytes(config, deepspeed, world.size), activation_bytes(config, micro)
        report.facts.append(
            f"GPU memory: {_gib(states)} of states, some {_gib(activations)} of activations (an estimate)"
        )
    return report


def merged(seen: list[Seen]) -> list[str]:
    """Every problem once, with the hosts that have it where others have not."""
    hosts = {s.host for s in seen}
    having: dict[str, dict[str, None]] = {}
    for s in seen:
        for problem in s.problems:
            having.setdefault(problem, {})[s.host] = None
    return [p if len(on) == len(hosts) else f"{p} (on {', '.join(on)})" for p, on in having.items()]


def clock_problems(seen: list[Seen]) -> list[str]:
    first, last = min(seen, key=lambda s: s.clock), max(seen, key=lambda s: s.clock)
    apart = last.clock - first.clock
    if apart <= MOST_SKEW:
        return []
    allowed = f"{MOST_SKEW:.0f} s are allowed, as ages of files are compared; set them by NTP"
    return [f"clocks: {last.host} is {apart:.0f} s ahead of {first.host}, {allowed}"]


def gpu_problems(seen: list[Seen]) -> list[str]:
    kinds: dict[str, dict[str, None]] = {}
    for s in seen:
        kinds.setdefault(s.gpu, {})[s.host] = None
    if len(kinds) == 1:
        return []
    listed = "; ".join(f"{gpu} on {', '.join(hosts)}" for gpu, hosts in kinds.items())
    return [f"GPUs: not all alike ({listed}): every step would wait for the slowest; take nodes of one kind"]


def _bytes_in(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
