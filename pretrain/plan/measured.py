"""Rates of a run that was trained, read from its curves."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from pretrain.config_files import KEPT_CONFIG
from pretrain.curves import curve

POINTS = 4  # at the least; the first has the start in it, and does not count


@dataclass(frozen=True)
class Measured:
    """What a run's curves say.

    Attributes:
        run: its folder.
        mfu: median share of its devices' peak.
        step_s: median seconds of a step.
        jitter: relative spread of a single step's time: that of the curve's points, times the root of the steps of each.
    """

    run: Path
    mfu: float
    step_s: float
    jitter: float


def read_run(run: Path) -> Measured:
    """Reads a run's rates.

    Raises:
        ValueError: it is no run, or has too few points of a curve; says which, and how to make them.
    """
    if not (run / KEPT_CONFIG).is_file():
        raise ValueError(
            f"--measured {run}: no run, as {run / KEPT_CONFIG} is missing; give a folder such as runs/NAME"
        )
    mfu, step_s = (_points(run, tag) for tag in ("speed/mfu_percent", "speed/step_s"))
    steps = sorted(step_s)
    times = list(step_s.values())
    return Measured(
        run,
        statistics.median(mfu.values()) / 100,
        statistics.median(times),
        spread(times) * (steps[1] - steps[0]) ** 0.5,
    )


def _points(run: Path, tag: str) -> dict[int, float]:
    """The values of a curve by step, but for its first."""
    values = curve(run, tag)
    if len(values) < POINTS:
        raise ValueError(
            f"--measured {run}: its curve {tag} has {len(values)} points, {POINTS} are needed; a training writes one each "
            f"logging.every steps: python -m pretrain.train {run / KEPT_CONFIG} run_dir={run} logging.every=5 steps=100"
        )
    return dict(sorted(values.items())[1:])


def spread(values: list[float]) -> float:
    """A robust standard deviation as a share of the median: 1.4826 times the median deviation from it."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(v - middle) for v in values) / middle
