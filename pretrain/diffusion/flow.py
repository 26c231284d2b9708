"""Rectified flow (arXiv 2209.03003; logit-normal times: arXiv 2403.03206).

t = 0 is data, t = 1 is noise:

    x_t = (1 − t)·x_0 + t·ε,     target = dx_t/dt = ε − x_0

The backbone sees the timestep 1000·t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.diffusion.objective import NoisySample


@dataclass(frozen=True)
class RectifiedFlow:
    """The velocity objective.

    Attributes:
        mean, std: of the normal whose logistic is t.
        shift: s of t ← s·t / (1 + (s − 1)·t): above 1 trains more near noise, for larger pictures.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def corrupt(self, latent_BCHW: Tensor, noise_BCHW: Tensor, uniform_B: Tensor) -> NoisySample:
        """The path's point and velocity; `uniform_B` in (0, 1) chooses t by its quantile."""
        u = uniform_B.double().clamp(1e-7, 1 - 1e-7)
        t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)).float()
        t = self.shift * t / (1 + (self.shift - 1) * t)
        t_B111 = t[:, None, None, None]
        noisy = (1 - t_B111) * latent_BCHW + t_B111 * noise_BCHW
        return NoisySample(noisy, timestep_B=1000 * t, target_BCHW=noise_BCHW - latent_BCHW)
