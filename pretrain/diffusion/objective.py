"""The training objective: forms x_t and the target from noise and times, and measures the prediction.

Letters: B images, C latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NoisySample:
    """The backbone's input and target; `timestep_B` in 0..1000 (0 is data)."""

    noisy_BCHW: Tensor
    timestep_B: Tensor
    target_BCHW: Tensor


@dataclass(frozen=True)
class Loss:
    """Mean squared error: the batch's mean, and per sample with its timestep (both without gradient).

    `alignment` is another loss (models/alignment.py) that is minimised with the weight `alignment_weight`; None without one.
    """

    mean: Tensor
    per_sample_B: Tensor
    timestep_B: Tensor
    alignment: Tensor | None = None
    alignment_weight: float = 0.0

    @property
    def total(self) -> Tensor:
        """What a step minimises."""
        return self.mean if self.alignment is None else self.mean + self.alignment_weight * self.alignment


class Objective(Protocol):
    """A way from data to noise and what to predict on it."""

    def corrupt(self, latent_BCHW: Tensor, noise_BCHW: Tensor, uniform_B: Tensor) -> NoisySample:
        """The noisy latents and the target; `uniform_B` in 0..1 chooses each time by its quantile."""
        ...

    def at(self, latent_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> NoisySample:
        """The noisy latents and the target at the noise levels `t_B` (timestep / 1000)."""
        ...

    def cdf(self, t: float) -> float:
        """The share of training times (timestep / 1000) below t: the number in 0..1 for which `corrupt` chooses t.

        Uniform numbers scaled to cdf(a)..cdf(b) draw the times between a and b, as often as they are there.
        """
        ...


def measure(prediction_BCHW: Tensor, sample: NoisySample, judged_BHW: Tensor | None = None) -> Loss:
    """The prediction's squared error against the target, in fp32.

    Args:
        judged_BHW: 1 for the pixels that it is the mean of, 0 for the others; by default all are.
    """
    error = F.mse_loss(prediction_BCHW.float(), sample.target_BCHW, reduction="none")
    if judged_BHW is None:
        per_sample_B = error.flatten(1).mean(1)
    else:
        per_sample_B = (error.mean(1) * judged_BHW).sum((1, 2)) / judged_BHW.sum((1, 2))
    return Loss(per_sample_B.mean(), per_sample_B.detach(), sample.timestep_B)
