"""Rectified flow (arXiv 2209.03003) with logit-normal or uniform times.

Logit-normal times: arXiv 2403.03206; uniform ones: SiT, arXiv 2401.08740.

t = 0 is data, t = 1 is noise:

    x_t = (1 − t)·x_0 + t·ε,     target = dx_t/dt = ε − x_0

The backbone sees the timestep 1000·t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from pretrain.diffusion.objective import NoisySample


@dataclass(frozen=True)
class RectifiedFlow:
    """The velocity objective.

    Attributes:
        mean, std: of the normal whose logistic is t; uniform times have neither.
        shift: s of t ← s·t / (1 + (s − 1)·t): above 1 trains more near noise, for larger pictures.
        times: logit_normal | uniform, what t is before the shift.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    times: str = "logit_normal"

    def corrupt(self, latent_BCHW: Tensor, noise_BCHW: Tensor, uniform_B: Tensor) -> NoisySample:
        """The path's point and velocity; `uniform_B` in (0, 1) chooses t by its quantile."""
        t = uniform_B.double().clamp(1e-7, 1 - 1e-7)
        if self.times == "logit_normal":
            t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(t))
        t = t.float()
        return self.at(latent_BCHW, noise_BCHW, self.shift * t / (1 + (self.shift - 1) * t))

    def at(self, latent_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> NoisySample:
        """The path's point and velocity at t in 0..1."""
        t_B111 = t_B[:, None, None, None]
        noisy = (1 - t_B111) * latent_BCHW + t_B111 * noise_BCHW
        return NoisySample(noisy, timestep_B=1000 * t_B, target_BCHW=noise_BCHW - latent_BCHW)

    def cdf(self, t: float) -> float:
        """The share of times below t in 0..1."""
        if not 0 < t < 1:
            return float(t >= 1)
        odds = t / (1 - t) / self.shift  # of noise against data; the shift has multiplied them
        if self.times == "uniform":
            return odds / (1 + odds)
        return NormalDist(self.mean, self.std).cdf(math.log(odds))
