"""What a GPU could do at best: a training step's FLOPs, bytes and time by block and part, computed without any GPU.

Forward and backward pass of one micro-batch, without the optimizer, the network and the data. A kernel takes as long as its
FLOPs or its bytes do, whichever is longer, at a share of the data sheet's rates (the constants below: what large kernels reach,
not their peaks). Three ways: `eager`, one kernel for each operation; `compiled`, as kernels.py estimates; `fp8`, compiled, with
the products of fp8.py, whose operands are cast in each product. MFU counts the model's FLOPs, three forward
passes, against the data sheet's bf16 rate, in all three.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_prep.common.files import atomic_write
from data_prep.common.paths import path
from data_prep.encoders import DOWNSAMPLE
from pretrain.bench.kernels import ATTENTION, MATRIX, PARTS, Kernel, eager, fused, record_step
from pretrain.fp8 import computes_in_fp8
from pretrain.gpus import GPUS, Gpu, named_gpu
from pretrain.models import DiTConfig, preset
from pretrain.models.budget_choices import default_budget
from pretrain.models.cost import grid_of, training_flops

# Shares of the data sheet's rates that kernels are taken to reach, and the shortest time of one.
MATRIX_SHARE, FP8_SHARE, ATTENTION_SHARE, MEMORY_SHARE = 0.8, 0.7, 0.45, 0.9
KERNEL_SECONDS = 3e-6
WAYS = ("eager", "compiled", "fp8")
LEVEL = 0.5  # noise level, where the compute budget depends on it


@dataclass
class Cost:
    """A sum over kernels."""

    flops: float = 0.0
    bytes_moved: float = 0.0
    seconds: float = 0.0
    kernels: int = 0

    def add(self, kernel: Kernel, bytes_moved: float, seconds: float) -> None:
        self.flops += kernel.flops
        self.bytes_moved += bytes_moved
        self.seconds += seconds
        self.kernels += 1


# By block (None: outside of all) and part.
Costs = dict[tuple[int | None, str], Cost]


@dataclass(frozen=True)
class Roofline:
    """The costs of a micro-batch in each of WAYS, and the model's FLOPs that MFU counts."""

    config: DiTConfig
    gpu: Gpu
    resolution: int
    batch: int
    model_flops: float
    costs: dict[str, Costs]

    def seconds(self, way: str) -> float:
        return sum(cost.seconds for cost in self.costs[way].values())

    def mfu(self, way: str) -> float:
        return self.model_flops / self.seconds(way) / (self.gpu.bf16_tflops * 1e12)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--preset", default="focusdit_1b_shared2d")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 20], help="a micro-batch for each resolution")
    parser.add_argument("--out", type=path, help="JSON file for all numbers, by block")


def run(args: argparse.Namespace) -> str:
    """The table."""
    if len(args.batches) != len(args.resolutions):
        raise ValueError(f"--batches: {len(args.batches)} for {len(args.resolutions)} resolutions; give one for each")
    config, gpu = preset(args.preset), named_gpu(args.gpu)
    found = [compute(config, gpu, *each) for each in zip(args.resolutions, args.batches, strict=True)]
    if args.out:
        atomic_write(args.out, json.dumps([to_json(each) for each in found], indent=1))
    return "\n\n".join(table(args.preset, each) for each in found)


def captions(images: int) -> list[int]:
    """Numbers of tokens of captions, from 20 to 150."""
    rng = random.Random(0)
    return [rng.randint(20, 150) for _ in range(images)]


def compute(config: DiTConfig, gpu: Gpu, resolution: int, batch: int) -> Roofline:
    """Counts a micro-batch at a resolution in pixels. Raises ValueError where the model cannot do it."""
    grid = grid_of(config, resolution, DOWNSAMPLE)
    if problems := config.grid_problems(grid):
        raise ValueError("; ".join(problems))
    lengths, budget = captions(batch), default_budget(config, LEVEL)
    operations = record_step(config, grid, lengths, LEVEL)
    kernels = {"eager": eager(operations), "compiled": fused(operations)}
    costs = {way: _costs(each, gpu, fp8=False) for way, each in kernels.items()}
    if gpu.fp8_tflops:
        costs["fp8"] = _costs(kernels["compiled"], gpu, fp8=True)
    flops = training_flops(config, batch, grid, sum(lengths), budget)
    return Roofline(config, gpu, resolution, batch, flops, costs)


def _costs(kernels: Iterable[Kernel], gpu: Gpu, fp8: bool) -> Costs:
    costs: Costs = defaultdict(Cost)
    for kernel in kernels:
        eight = fp8 and kernel.kind == MATRIX and computes_in_fp8(kernel.site.module)
        # Each operand is read, written in half the bytes, and read again so.
        bytes_moved = (2 if eight else 1) * kernel.bytes_read + kernel.bytes_written
        cost = costs[kernel.site.block, kernel.site.part]
        cost.add(kernel, bytes_moved, seconds_of(kernel.kind, kernel.flops, bytes_moved, gpu, eight))
    return dict(costs)


def seconds_of(kind: str, flops: float, bytes_moved: float, gpu: Gpu, fp8: bool = False) -> float:
    """The time of a kernel."""
    tflops = gpu.bf16_tflops * (ATTENTION_SHARE if kind == ATTENTION else MATRIX_SHARE)
    if fp8:
        tflops = gpu.fp8_tflops * FP8_SHARE
    return max(flops / (tflops * 1e12), bytes_moved / (gpu.memory_tbs * MEMORY_SHARE * 1e12), KERNEL_SECONDS)


# ---- output ----


def groups_of(found: Roofline) -> list[list[int]]:
    """The blocks, those of equal FLOPs in all parts together."""
    groups: dict[tuple[float, ...], list[int]] = defaultdict(list)
    costs = found.costs["eager"]
    for block in range(found.config.depth):
        groups[tuple(costs.get((block, part), Cost()).flops for part in PARTS)].append(block)
    return list(groups.values())


def table(name: str, found: Roofline) -> str:
    """The costs as text: of each block in the mean over equal blocks, of the rest, and of all."""
    gpu, ways = found.gpu, [way for way in WAYS if way in found.costs]
    fp8 = f", {gpu.fp8_tflops * FP8_SHARE:.0f} in fp8" if gpu.fp8_tflops else ""
    about = f"{name} at {found.resolution} px, micro-batch {found.batch}, captions of 20 to 150 tokens"
    rates = f"{gpu.bf16_tflops * MATRIX_SHARE:.0f} TFLOP/s of products{fp8}, {gpu.bf16_tflops * ATTENTION_SHARE:.0f} of attention"
    lines = [
        f"{about}: forward and backward on {gpu.device}, computed",
        f"at {rates}, {gpu.memory_tbs * MEMORY_SHARE:.2f} TB/s",
        f"{'':<30}{'TFLOP':>8}" + "".join(f"{way + ' GB':>14}{'ms':>8}" for way in ways),
    ]
    for blocks in groups_of(found):
        lines.append(_ranges(blocks) + (", each" if len(blocks) > 1 else ""))
        for part in PARTS:
            each = [[found.costs[way].get((block, part), Cost()) for block in blocks] for way in ways]
            if any(cost.kernels for costs in each for cost in costs):
                lines.append(_line(f"  {part}", each, len(blocks)))
    lines.append(_line("outside of the blocks", [_sum(found, way, blocks=False) for way in ways]))
    lines.append(_line("all", [_sum(found, way, blocks=True) for way in ways]))
    lines.append(f"{'expected MFU':<38}" + "".join(f"{found.mfu(way):>21.1%} " for way in ways))
    return "\n".join(lines)


def _sum(found: Roofline, way: str, blocks: bool) -> list[Cost]:
    return [cost for (block, _), cost in found.costs[way].items() if blocks or block is None]


def _line(name: str, ways: Sequence[Sequence[Cost]], blocks: int = 1) -> str:
    """One row: the sum over the costs of each way, divided by the number of blocks."""
    text = f"{name:<30}{sum(c.flops for c in ways[0]) / blocks / 1e12:>8.3f}"
    for costs in ways:
        moved, seconds = (sum(getattr(c, field) for c in costs) / blocks for field in ("bytes_moved", "seconds"))
        text += f"{moved / 1e9:>14.2f}{seconds * 1e3:>8.2f}"
    return text


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers of blocks as words: `blocks 0 to 3, 7`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ("blocks " if len(numbers) > 1 else "block ") + ", ".join(
        f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs
    )


def to_json(found: Roofline) -> dict[str, Any]:
    """All numbers, by block and part."""
    return {
        "computed": True,
        "gpu": asdict(found.gpu),
        "shares": {"matrix": MATRIX_SHARE, "fp8": FP8_SHARE, "attention": ATTENTION_SHARE, "memory": MEMORY_SHARE},
        "model": asdict(found.config),
        "resolution": found.resolution,
        "batch": found.batch,
        "model_flops": found.model_flops,
        "ways": {
            way: {
                "seconds": found.seconds(way),
                "mfu": found.mfu(way),
                "parts": [{"block": block, "part": part} | asdict(cost) for (block, part), cost in costs.items()],
            }
            for way, costs in found.costs.items()
        },
    }
