"""Sweep of a plan over 1 to 1,024 GPUs: simulated steps and runs, as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.common.files import atomic_write
from pretrain.plan.figures import number, to_csv
from pretrain.plan.simulation import Run, mean_run, mean_step
from pretrain.plan.stage import Stage
from pretrain.plan.work import AGREEMENTS, COLLECTIVE_SHARE, LINK_S, MEMORY_SHARE, NETWORK_S, network_of, work_of

COUNTS = tuple(2**n for n in range(11))


@dataclass(frozen=True)
class Point:
    """A stage, or `all stages`, on a number of GPUs.

    Attributes:
        used: GPUs that train: as many as divide the batch.
        compute_s, waiting_s, reduction_s, optimizer_s, gather_s: parts of a mean step, whose sum is step_s. Of all stages they
            are means over all steps, as is `micro_batch`.
        efficiency: share of all GPUs' time that goes into forward and backward passes, as long as steps are taken.
        hours: from the first start to the last checkpoint, failures included.
        goodput: share of them in which steps are taken that count.
        failures: their mean number.
    """

    stage: str
    gpus: int
    used: int
    overlap: bool
    micro_batch: float
    recompute: bool
    step_s: float
    compute_s: float
    waiting_s: float
    reduction_s: float
    optimizer_s: float
    gather_s: float
    efficiency: float
    hours: float
    goodput: float
    failures: float
    gpu_hours: float
    money: float | None


def point(stage: Stage, overlap: bool) -> Point:
    """Simulates a stage on its cluster. Raises ValueError where it does not fit in a GPU's memory."""
    setting, gpus, used = stage.setting, stage.setting.cluster.gpus, stage.cluster.gpus
    work = work_of(stage, setting.jitter, overlap)
    step = mean_step(work, network_of(stage.cluster), used)
    run = mean_run(
        Run(
            steps=stage.config.steps,
            step_s=step.total,
            every=stage.config.checkpoint.every,
            stop_s=stage.checkpoint_stop_s,
            write_s=stage.checkpoint_write_s if stage.config.checkpoint.background else 0.0,
            restart_s=setting.restart_s,
            failures_per_s=used / setting.failure_hours / 3600,
        )
    )
    hours = run.seconds / 3600
    return Point(
        stage=stage.name,
        gpus=gpus,
        used=used,
        overlap=overlap,
        micro_batch=stage.micro.images,
        recompute=stage.micro.recompute,
        step_s=step.total,
        compute_s=step.compute,
        waiting_s=step.waiting,
        reduction_s=step.reduction,
        optimizer_s=step.optimizer,
        gather_s=step.gather,
        efficiency=work.compute_s / step.total * used / gpus,
        hours=hours,
        goodput=run.goodput,
        failures=run.failures,
        gpu_hours=hours * gpus,
        money=None if setting.price is None else hours * gpus * setting.price,
    )


def simulate(stages: Sequence[Stage]) -> list[Point]:
    """The points of each stage with and without overlap, and of all together, on each number of GPUs on which all fit."""
    points = []
    for gpus in COUNTS:
        for overlap in (True, False):
            found = [point(stage.on(gpus), overlap) for stage in stages if stage.on(gpus).fitting_micro]
            points += found
            if len(found) == len(stages) > 1:
                points.append(together(found, [stage.config.steps for stage in stages]))
    return points


def together(points: Sequence[Point], steps: Sequence[int]) -> Point:
    """Stages one after another."""

    def mean(field: str) -> float:
        return sum(getattr(p, field) * n for p, n in zip(points, steps, strict=True)) / sum(steps)

    seconds = [p.step_s * n for p, n in zip(points, steps, strict=True)]
    hours = sum(p.hours for p in points)
    prices = [p.money for p in points if p.money is not None]
    means = ("micro_batch", "step_s", "compute_s", "waiting_s", "reduction_s", "optimizer_s", "gather_s")
    return Point(
        stage="all stages",
        gpus=points[0].gpus,
        used=max(p.used for p in points),
        overlap=points[0].overlap,
        recompute=any(p.recompute for p in points),
        efficiency=sum(p.efficiency * s for p, s in zip(points, seconds, strict=True)) / sum(seconds),
        hours=hours,
        goodput=sum(p.goodput * p.hours for p in points) / hours,
        failures=sum(p.failures for p in points),
        gpu_hours=sum(p.gpu_hours for p in points),
        money=sum(prices) if prices else None,
        **{field: mean(field) for field in means},
    )


def sweep(stages: Sequence[Stage], folder: Path) -> str:
    """Simulates, writes sweep.csv and sweep.png, and returns a table with the assumptions.

    Raises:
        ValueError: no stage fits in the memory of even 1,024 such GPUs.
    """
    points = simulate(stages)
    if not points:
        raise ValueError(
            f"--sweep: {', '.join(s.name for s in stages)} fit in no number of these GPUs up to {COUNTS[-1]}"
        )
    from pretrain.plan.picture import draw  # late: matplotlib takes a second

    atomic_write(folder / "sweep.csv", to_csv([asdict(p) for p in points]))
    draw(points).save(folder / "sweep.png")
    return f"{table(points)}\n\n{assumptions(stages[0])}\n\nwritten: {folder}/sweep.csv, sweep.png"


def table(points: Sequence[Point]) -> str:
    """The points with overlap of each stage."""
    lines = ["simulated, the reduction beside the last backward pass"]
    names = list(dict.fromkeys(p.stage for p in points))
    lines.append(
        f"  {'stage':<14}{'GPUs':>6}{'used':>6}{'micro':>7}{'step s':>9}{'passes':>8}{'waiting':>8}{'reduce':>8}"
        f"{'update':>8}{'gather':>8}{'efficient':>10}{'goodput':>9}{'hours':>9}{'GPU-hours':>11}{'money':>10}"
    )
    for p in (p for name in names for p in points if p.stage == name and p.overlap):
        parts = (p.compute_s, p.waiting_s, p.reduction_s, p.optimizer_s, p.gather_s)
        shares = "".join(f"{share / p.step_s:>8.1%}" for share in parts)
        money = "" if p.money is None else number(p.money)
        lines.append(
            f"  {p.stage:<14}{p.gpus:>6,}{p.used:>6,}{p.micro_batch:>7.4g}{p.step_s:>9.4g}{shares}"
            f"{p.efficiency:>10.1%}{p.goodput:>9.1%}{number(p.hours):>9}{number(p.gpu_hours):>11}{money:>10}"
        )
    return "\n".join(lines)


def assumptions(stage: Stage) -> str:
    """What the simulation rests on, in lines."""
    s, c = stage.setting, stage.setting.cluster
    reached = f"{COLLECTIVE_SHARE:.0%} of {c.gpu.link_gbs:g} GB/s in a node of {c.gpus_per_node}"
    between = f"of {c.network_gbs:g} GB/s a GPU between nodes; {LINK_S * 1e6:g} and {NETWORK_S * 1e6:g} µs a hop"
    failures = (
        f"one in {s.failure_hours:,.0f} hours of a GPU ends all; {s.restart_s:g} s from each start to its first step"
    )
    lines = (
        f"passes: products at an MFU of {s.mfu:.1%} ({s.mfu_from}) whatever the micro-batch, the largest that fits",
        f"waiting: for the slowest GPU; each GPU's time varies by {s.jitter:.1%} from step to step ({s.jitter_from})",
        f"reduce, gather: rings at {reached} and {between}; assumed",
        f"update: at {MEMORY_SHARE:.0%} of {c.gpu.memory_tbs:g} TB/s, {AGREEMENTS} sum of a few numbers over all GPUs; assumed",
        f"goodput: {failures}; checkpoints at {c.disk_gbs:g} GB/s; assumed; mean of 50 runs",
    )
    return "\n".join(f"  {line}" for line in lines)


def finite(values: Sequence[float]) -> list[float]:
    """Values for a picture, without those of runs that never end."""
    return [v if math.isfinite(v) else math.nan for v in values]
