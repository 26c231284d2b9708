"""From noise to a latent: a loop over a scheduler in diffusers' form, which `pretrain/pipeline.py` brings.

Flow matching: Euler steps over sigmas 1 … 1/n, shifted. ε-prediction: DPM-Solver++ (arXiv 2211.01095).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def sample(predict: Callable[[Tensor, Tensor], Tensor], noise_BCHW: Tensor, scheduler: Any) -> Tensor:
    """Follows the scheduler's timesteps from noise [B, C, H, W] to a latent of the same shape, in fp32.

    `predict(latent, timestep)` is the (guided) backbone; the scheduler has had its timesteps set.
    """
    latent = noise_BCHW
    for timestep in scheduler.timesteps:
        latent = scheduler.step(predict(latent, timestep).float(), timestep, latent, return_dict=False)[0]
    return latent
