"""Spike guard: skips optimizer steps that would harm the model, with one verdict for all processes.

One sum over the processes at the end of a step carries the loss, the gradient's norm, the number of processes that were asked
to stop, and of those that read damaged data. So all processes come to the same verdict, without another wait for the device:
it takes the place of DeepSpeed's own check of the gradients, which waits for the device, too.

A step is skipped where its loss or gradient is not finite or lies above a robust bound on the last applied steps of its
group: `deviations` times the spread above the median, both of the logarithm (spread: 1.4826 × the median distance from the
median), and never below twice the median. Skipped steps do not count into the bound.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from pretrain.config import GuardSection
from pretrain.diffusion import Loss
from pretrain.distributed.engine import GradientCheck
from pretrain.distributed.world import World, all_gather, all_reduce
from pretrain.resilience.signals import StopRequest, reason
from pretrain.state import StepHistory, StepVerdict, json_number

SKIPPED = "skipped_steps.jsonl"


@dataclass
class _MicroBatches:
    """Micro-batches of this process in the current step; losses stay on the device."""

    keys: list[tuple[str, ...]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    loss_sum: Tensor | None = None
    damaged: int = 0


class SpikeGuard:
    """Judges each optimizer step: `begin`, `add` for each micro-batch, then `judge`, which the engine calls.

    Attributes:
        verdict: the last step's, equal on all processes.
    """

    def __init__(self, config: GuardSection, world: World, stop: StopRequest):
        self.config, self.world, self.stop = config, world, stop
        self.verdict = StepVerdict(math.nan, math.nan)
        self._history, self._group, self._step = StepHistory(), 0, _MicroBatches()

    def begin(self, history: StepHistory, group: int = 0) -> None:
        """Begins a step that is compared with the steps of the same group in `history`."""
        self._history, self._group, self._step = history, group, _MicroBatches()

    def add(self, keys: tuple[str, ...], loss: Loss, damaged: int = 0) -> None:
        """Adds a micro-batch: its samples' keys, its loss, and the number of its samples that could not be read."""
        step = self._step
        step.keys.append(keys)
        step.losses.append(loss.per_sample_B)
        step.loss_sum = loss.mean.detach() if step.loss_sum is None else step.loss_sum + loss.mean.detach()
        step.damaged += damaged

    def judge(self, squared_norm: Tensor) -> GradientCheck:
        """Decides whether the step is applied. All processes call it.

        Args:
            squared_norm: squared L2 norm of this process's share of the gradient, fp64 [].
        """
        step = self._step
        assert step.loss_sum is not None
        counts = torch.tensor([len(step.losses), self.stop.code != 0, step.damaged != 0], dtype=torch.float64)
        sums = torch.cat(
            [step.loss_sum.double()[None], squared_norm[None], counts.to(squared_norm.device, non_blocking=True)]
        )
        loss_sum, squares, micros, stop, damaged = all_reduce(sums, self.world).tolist()
        norm = math.sqrt(squares) if squares >= 0 else math.nan
        verdict = StepVerdict(loss_sum / micros, norm, None, int(stop), int(damaged), self._group)
        self.verdict = replace(verdict, fault=self._fault(verdict))
        return GradientCheck(sums[1].sqrt().float(), self.verdict.fault is None)

    def _fault(self, verdict: StepVerdict) -> str | None:
        """Says why a step must be skipped; None for a healthy one."""
        history, group, deviations = self._history, verdict.group, self.config.deviations
        for name, value, earlier in (
            ("loss", verdict.loss, history.losses_of(group)),
            ("gradient's norm", verdict.norm, history.norms_of(group)),
        ):
            if not math.isfinite(value):
                return f"the {name} is {value}"
            bounded = len(earlier) >= self.config.min_history and deviations > 0
            if bounded and value > (most := bound(earlier, deviations)):
                return f"the {name} is {value:.4g}, more than {most:.4g}, the bound after the last {len(earlier)} steps"
        return None

    def record_skipped(self, run_dir: Path, step: int) -> None:
        """Appends the skipped step to RUN/skipped_steps.jsonl, with every sample's key and loss. All processes call it."""
        losses = torch.cat(self._step.losses).tolist()
        keys = [key for keys in self._step.keys for key in keys]
        everyone = all_gather(list(zip(keys, losses, strict=True)), self.world)
        if self.world.rank == 0:
            samples = [{"key": key, "loss": json_number(loss)} for some in everyone for key, loss in some]
            v = self.verdict
            line = {
                "step": step,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "why": v.fault,
                "loss": json_number(v.loss),
                "gradient_norm": json_number(v.norm),
                "samples": samples,
            }
            try:
                with (run_dir / SKIPPED).open("a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:  # a full disk does not stop training
                print(f"WARNING: {run_dir / SKIPPED} cannot be written ({error}): {json.dumps(line)}", flush=True)

    def stop_reason(self) -> str:
        """Names what asked for a stop, and the processes that it asked. All processes call it."""
        codes = all_gather(self.stop.code, self.world)
        reasons = {reason(code) for code in codes if code}
        ranks = [rank for rank, code in enumerate(codes) if code]
        named = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
        return f"{' and '.join(sorted(reasons))} (process {named})"


def bound(values: tuple[float, ...], deviations: float) -> float:
    """The largest plausible next value after `values`, all above 0."""
    logs = [math.log(max(v, 1e-30)) for v in values]
    centre = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(v - centre) for v in logs)
    return math.exp(centre + max(deviations * spread, math.log(2)))
