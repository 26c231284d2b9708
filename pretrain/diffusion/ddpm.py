"""ε-prediction on DDPM's linear schedule (arXiv 2006.11239), the objective that the paper writes.

    x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε,     target = ε,     t in 0..999,  β from 1e-4 to 0.02

t = 0 is (nearly) data, t = 999 (nearly) noise; the backbone sees t itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.diffusion.objective import NoisySample

STEPS, BETA_START, BETA_END = 1000, 1e-4, 0.02


@dataclass(frozen=True)
class EpsilonPrediction:
    """The noise objective: each of the steps is as likely."""

    def corrupt(self, latent_BCHW: Tensor, noise_BCHW: Tensor, uniform_B: Tensor) -> NoisySample:
        """The process's point and noise; `uniform_B` in (0, 1) chooses t, and is t / STEPS itself."""
        return self.at(latent_BCHW, noise_BCHW, uniform_B)

    def at(self, latent_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> NoisySample:
        """The process's point and noise at the step below `t_B`·STEPS."""
        beta = torch.linspace(BETA_START, BETA_END, STEPS, dtype=torch.float64, device=latent_BCHW.device)
        kept = torch.cumprod(1 - beta, dim=0)
        step_B = (t_B * STEPS).long().clamp(0, STEPS - 1)
        kept_B111 = kept[step_B].float()[:, None, None, None]
        noisy = kept_B111.sqrt() * latent_BCHW + (1 - kept_B111).sqrt() * noise_BCHW
        return NoisySample(noisy, timestep_B=step_B.float(), target_BCHW=noise_BCHW)

    def cdf(self, t: float) -> float:
        """The share of times below t, a multiple of 1/STEPS: t itself."""
        return min(max(t, 0.0), 1.0)
