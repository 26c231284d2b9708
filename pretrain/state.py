"""State of a run as plain values: counters, the position in the data, and the last steps' losses.

A checkpoint keeps them as JSON under the keys of its first versions (`health` is the history, `bins` its groups), so that
older runs resume. Nothing here needs torch or DeepSpeed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class DataPosition:
    """Place of a run in its data: an epoch, and the complete optimizer steps of it."""

    epoch: int = 0
    step_in_epoch: int = 0


@dataclass(frozen=True)
class StepVerdict:
    """Outcome of one optimizer step, equal on all processes.

    Attributes:
        loss: mean over the global batch.
        norm: L2 norm of the whole gradient before clipping.
        fault: why the step was skipped; None for an applied step.
        stop: number of processes that were asked to stop.
        damaged: number of processes that read damaged data.
        group: opaque key of the steps that this one is compared with.
    """

    loss: float
    norm: float
    fault: str | None = None
    stop: int = 0
    damaged: int = 0
    group: int = 0


@dataclass(frozen=True)
class StepHistory:
    """Losses and gradient norms of the last applied steps, and counts of the skipped ones.

    Each checkpoint holds it, so that a resumed run judges its next step as an uninterrupted one would.

    Attributes:
        losses, norms, groups: one entry for each applied step, the newest last; `groups` are opaque keys.
        skipped: steps of the whole run that were not applied.
        in_a_row: steps skipped since the last applied one.
        rollbacks: returns to an earlier checkpoint; after each the run uses other noise and another order of the data.
    """

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    groups: tuple[int, ...] = ()
    skipped: int = 0
    in_a_row: int = 0
    rollbacks: int = 0

    def after(self, verdict: StepVerdict, window: int) -> StepHistory:
        """Adds a step; of the applied steps it keeps the last `window` of each group."""
        if verdict.fault:
            return replace(self, skipped=self.skipped + 1, in_a_row=self.in_a_row + 1)
        steps = [*zip(self.losses, self.norms, self.groups, strict=True), (verdict.loss, verdict.norm, verdict.group)]
        same_group = [i for i, (_, _, group) in enumerate(steps) if group == verdict.group]
        for i in reversed(same_group[:-window]):
            del steps[i]
        losses, norms, groups = zip(*steps, strict=True)
        return replace(self, losses=losses, norms=norms, groups=groups, in_a_row=0)

    def losses_of(self, group: int) -> tuple[float, ...]:
        """Losses of the steps of one group."""
        return self._select(self.losses, group)

    def norms_of(self, group: int) -> tuple[float, ...]:
        """Gradient norms of the steps of one group."""
        return self._select(self.norms, group)

    def _select(self, values: tuple[float, ...], group: int) -> tuple[float, ...]:
        return tuple(value for value, its_group in zip(values, self.groups, strict=True) if its_group == group)


@dataclass(frozen=True)
class RunState:
    """Counters of a run.

    Attributes:
        step: optimizer steps tried, skipped ones included.
        updates: steps that the optimizer applied.
        images: pictures trained on, over all processes.
        position: where the data goes on.
        history: what the next step is judged by.
    """

    step: int = 0
    updates: int = 0
    images: int = 0
    position: DataPosition = field(default_factory=DataPosition)
    history: StepHistory = field(default_factory=StepHistory)

    def to_json(self) -> dict[str, Any]:
        """The state as a checkpoint keeps it."""
        content = asdict(self)
        history = content.pop("history")
        bins = history.pop("groups")
        return content | {"health": history | {"bins": bins}}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> RunState:
        """Reads what `to_json` gave. Raises KeyError where a key is missing."""
        health = content["health"]
        return cls(
            step=content["step"],
            updates=content["updates"],
            images=content["images"],
            position=DataPosition(**content["position"]),
            history=StepHistory(
                losses=tuple(health["losses"]),
                norms=tuple(health["norms"]),
                groups=tuple(health["bins"]),
                skipped=health["skipped"],
                in_a_row=health["in_a_row"],
                rollbacks=health["rollbacks"],
            ),
        )


def json_number(value: float) -> float | str:
    """A number for JSON, which has no nan and no infinity: those as a string."""
    return value if math.isfinite(value) else str(value)
