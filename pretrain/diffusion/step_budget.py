"""What each training step spends, where the backbone leaves a choice: the number of mediators, and the density's bin.

Both follow from the run's seed and the step's number: all processes agree, whatever their number, and a resumed run goes on
as it would have.

FlexDiT's sparse grid follows from the noise level's bin, so a step's global batch lies in one bin. Step s takes the bin of
the quantile (o + s·φ) mod 1 of the objective's times (φ the golden ratio's fraction, o from the seed): bins come as often as
the times lie in them, more evenly spaced than by chance, and within a bin the times are drawn as the objective has them. So
the mean over steps is the unbinned expectation, and no loss needs a weight.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from torch import Tensor

from pretrain.diffusion import Objective
from pretrain.models import DiTConfig, Effort
from pretrain.models.mixers.flexdit import BINS

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class StepEffort:
    """A step's effort, and the quantiles of the objective's times from which its times are drawn."""

    effort: Effort
    quantiles: tuple[float, float] = (0.0, 1.0)

    def narrow(self, uniform_B: Tensor) -> Tensor:
        """Uniform numbers in 0..1 to uniform ones between the quantiles."""
        low, high = self.quantiles
        return uniform_B if self.quantiles == (0.0, 1.0) else low + (high - low) * uniform_B


def step_effort(backbone: DiTConfig, objective: Objective, seed: int, step: int) -> StepEffort:
    """What step number `step` (from 0) of a run spends."""
    mediators = bin_ = None
    quantiles = (0.0, 1.0)
    if backbone.attention == "mediators":
        mediators = backbone.mediators[_number(f"mediators/{seed}/{step}") % len(backbone.mediators)]
    if backbone.density == "flexdit":
        edges = [objective.cdf(i / BINS) for i in range(BINS + 1)]
        quantile = (_number(f"density/{seed}") / 2**64 + step * GOLDEN) % 1
        bin_ = max(i for i in range(BINS) if edges[i] <= quantile)
        quantiles = (edges[bin_], edges[bin_ + 1])
    return StepEffort(Effort(mediators, bin_), quantiles)


def _number(words: str) -> int:
    """64 bits from a hash."""
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big")
