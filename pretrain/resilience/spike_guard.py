"""Steps that would harm the model are not applied: what all processes learn of a step before its update.

One sum over the processes at the end of a step carries the loss, the gradient's norm, whether anyone was asked to stop, and
whether anyone read damaged data. So the verdict is the same everywhere, and costs no further wait for the device: DeepSpeed's
own check of the gradients, which this one replaces, waited, too.

A step is skipped where its loss or its gradient is not finite, or lies beyond a robust bound: `deviations` times the spread
above the median of the last steps, both of the logarithm (spread: 1.4826 × the median distance from the median), and never
below twice the median. Skipped steps do not count into the bound.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import GuardSection
from pretrain.diffusion import Loss
from pretrain.distributed.engine import GradientCheck, World, gather
from pretrain.resilience.signals import Stop, reason

SKIPPED = "skipped_steps.jsonl"


@dataclass(frozen=True)
class Health:
    """What is remembered of a run's steps; in each checkpoint, so that a resumed run judges as an uninterrupted one.

    Attributes:
        losses, norms, bins: of the last applied steps, the newest last; a step is judged by those of its own bin.
        skipped: steps so far that were not applied; `in_a_row` of them without an applied one since.
        rollbacks: returns to a checkpoint so far; each goes on with other noise and another order of the data.
    """

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    bins: tuple[int, ...] = ()
    skipped: int = 0
    in_a_row: int = 0
    rollbacks: int = 0

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Health:
        """From a checkpoint's JSON."""
        return cls(**kept | {name: tuple(kept[name]) for name in ("losses", "norms", "bins")})

    def after(self, verdict: StepVerdict, window: int) -> Health:
        """With one step more; of each bin the last `window` are kept."""
        if verdict.fault:
            return replace(self, skipped=self.skipped + 1, in_a_row=self.in_a_row + 1)
        steps = [*zip(self.losses, self.norms, self.bins, strict=True), (verdict.loss, verdict.norm, verdict.bin)]
        of_bin = [i for i, (_, _, bin_) in enumerate(steps) if bin_ == verdict.bin]
        for i in reversed(of_bin[:-window]):
            del steps[i]
        losses, norms, bins = zip(*steps, strict=True)
        return replace(self, losses=losses, norms=norms, bins=bins, in_a_row=0)

    def of_bin(self, values: tuple[float, ...], bin_: int) -> tuple[float, ...]:
        """Those of the losses or norms that are of this bin's steps."""
        return tuple(value for value, of in zip(values, self.bins, strict=True) if of == bin_)


@dataclass(frozen=True)
class StepVerdict:
    """What all processes know of a step: its mean loss, its gradient's norm before clipping, and why it was skipped, if it was.

    `stop` and `damaged` are the numbers of processes that were asked to stop, and that read damaged data; `bin` is that of the
    noise levels, where all of a step's lie in one (pretrain/diffusion/step_budget.py).
    """

    loss: float
    norm: float
    fault: str | None = None
    stop: int = 0
    damaged: int = 0
    bin: int = 0


@dataclass
class _Micro:
    """The micro-batches of this process's step so far; losses stay on the device."""

    keys: list[tuple[str, ...]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    mean: Tensor | None = None
    damaged: int = 0


class SpikeGuard:
    """Judges each step. `begin`, `add` for each micro-batch, then the engine calls it; `verdict` is the last step's."""

    def __init__(self, config: GuardSection, world: World, stop: Stop):
        self.config, self.world, self.stop = config, world, stop
        self.verdict = StepVerdict(math.nan, math.nan)
        self._health, self._micro, self._bin = Health(), _Micro(), 0

    def begin(self, health: Health, bin_: int = 0) -> None:
        """A step begins, whose noise levels lie in this bin."""
        self._health, self._micro, self._bin = health, _Micro(), bin_

    def add(self, keys: tuple[str, ...], loss: Loss, damaged: int = 0) -> None:
        """One micro-batch of it."""
        m = self._micro
        m.keys.append(keys)
        m.losses.append(loss.per_sample_B)
        m.mean = loss.mean.detach() if m.mean is None else m.mean + loss.mean.detach()
        m.damaged += damaged

    def __call__(self, squared_norm: Tensor) -> GradientCheck:
        """Whether the step may be applied, from this process's share of the gradient's squared norm (fp64)."""
        m = self._micro
        assert m.mean is not None
        told = torch.tensor([len(m.losses), self.stop.code != 0, m.damaged != 0], dtype=torch.float64)
        sums = torch.cat([m.mean.double()[None], squared_norm[None], told.to(squared_norm.device, non_blocking=True)])
        if self.world.size > 1:
            dist.all_reduce(sums)
        loss_sum, squares, micros, stop, damaged = sums.tolist()
        norm = math.sqrt(squares) if squares >= 0 else math.nan
        verdict = StepVerdict(loss_sum / micros, norm, None, int(stop), int(damaged), self._bin)
        self.verdict = replace(verdict, fault=self._fault(verdict))
        return GradientCheck(sums[1].sqrt().float(), self.verdict.fault is None)

    def _fault(self, verdict: StepVerdict) -> str | None:
        h = self._health
        for name, value, last in (("loss", verdict.loss, h.losses), ("gradient's norm", verdict.norm, h.norms)):
            before = h.of_bin(last, verdict.bin)
            if not math.isfinite(value):
                return f"the {name} is {value}"
            enough = len(before) >= self.config.min_history and self.config.deviations > 0
            if enough and value > (most := bound(before, self.config.deviations)):
                return f"the {name} is {value:.4g}, more than {most:.4g}, the bound after the last {len(before)} steps"
        return None

    def record(self, run_dir: Path, step: int) -> None:
        """Appends a skipped step to the run's list, with every sample's key and loss. All processes call it."""
        losses = torch.cat(self._micro.losses).tolist()
        keys = [key for keys in self._micro.keys for key in keys]
        everyone = gather(list(zip(keys, losses, strict=True)), self.world)
        if self.world.rank == 0:
            samples = [{"key": key, "loss": _number(loss)} for some in everyone for key, loss in some]
            v = self.verdict
            line = {
                "step": step,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "why": v.fault,
                "loss": _number(v.loss),
                "gradient_norm": _number(v.norm),
                "samples": samples,
            }
            try:
                with (run_dir / SKIPPED).open("a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:  # a full disk does not stop training
                print(f"WARNING: {run_dir / SKIPPED} cannot be written ({error}): {json.dumps(line)}", flush=True)

    def stopped_by(self) -> str:
        """Who was asked to stop, and by what. All processes call it."""
        codes = gather(self.stop.code, self.world)
        asked = {reason(code) for code in codes if code}
        ranks = [rank for rank, code in enumerate(codes) if code]
        return (
            f"{' and '.join(sorted(asked))} (process {', '.join(map(str, ranks[:8]))}{', …' if len(ranks) > 8 else ''})"
        )


def bound(values: tuple[float, ...], deviations: float) -> float:
    """The largest value that the last ones, all above 0, let expect."""
    logs = [math.log(max(v, 1e-30)) for v in values]
    centre = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(v - centre) for v in logs)
    return math.exp(centre + max(deviations * spread, math.log(2)))


def _number(value: float) -> float | str:
    """JSON has no nan and no infinity."""
    return value if math.isfinite(value) else str(value)
