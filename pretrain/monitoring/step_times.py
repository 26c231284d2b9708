"""Times of steps and of forward passes of every process, and the slowest process named.

All processes end a step together, as they wait for each other's gradients; so a slow one shows in its forward passes, which
wait for nobody. On a GPU they are timed by events, which are read at logging steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.distributed.world import World, all_gather_into

CURVES_OF = 64  # more processes would hide in their curves what they are to show


@dataclass(frozen=True)
class TimesOfAll:
    """Figures of every process [processes]: median and 95th percentile of its steps' seconds, forward seconds, peak in GiB."""

    p50: Tensor
    p95: Tensor
    forward: Tensor
    peak_gib: Tensor

    def scalars(self) -> dict[str, float]:
        """The largest of each, and how much more time than the median process the slowest one's forward passes took.

        2 to CURVES_OF processes have curves of their own, too.
        """
        slowest = int(self.forward.argmax())
        median = self.forward.median().item()
        scalars = {
            "speed/step_p50_s": self.p50.max().item(),
            "speed/step_p95_s": self.p95.max().item(),
            "speed/slowest_process": float(slowest),
            "speed/slowest_process_behind_percent": 100 * (self.forward[slowest].item() / median - 1)
            if median
            else 0.0,
        }
        if 1 < len(self.forward) <= CURVES_OF:
            curves = {"step_p50_s": self.p50, "step_p95_s": self.p95, "forward_s": self.forward}
            for name, of_all in curves.items():
                scalars |= {f"process_{name}/{rank:03d}": value for rank, value in enumerate(of_all.tolist())}
        return scalars | ({"memory/peak_gib": self.peak_gib.max().item()} if self.peak_gib.any() else {})


class StepTimes:
    """Times of this process since the last call of `of_all`."""

    def __init__(self, world: World):
        self.world = world
        self._steps: list[float] = []
        self._forward_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.begin()

    def begin(self) -> None:
        """The next step begins now."""
        self._begun = time.perf_counter()

    def end_step(self) -> None:
        """A step ends, and the next one begins."""
        before, self._begun = self._begun, time.perf_counter()
        self._steps.append(self._begun - before)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Times what the device does within it, without waiting for it."""
        if self.world.device.type != "cuda":
            start = time.perf_counter()
            yield
            self._forward_s += time.perf_counter() - start
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    def of_all(self) -> TimesOfAll:
        """Every process's figures; the times start anew. All processes call it, after they have read something of the device."""
        forward_s = self._forward_s + sum(first.elapsed_time(last) for first, last in self._events) / 1000
        cuda = self.world.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        own = [*np.percentile(self._steps, [50, 95]), forward_s, peak]
        figures = torch.tensor(own, device=self.world.device)
        everyone = figures.repeat(self.world.size)
        all_gather_into(everyone, figures, self.world)
        self._steps, self._forward_s, self._events = [], 0.0, []
        return TimesOfAll(*everyone.view(-1, len(own)).cpu().unbind(1))
