"""From captions to latents with a trained backbone: diffusers' schedulers around the objective's prediction.

Letters: B images, C latent channels, S sampling steps, K blocks, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pretrain.diffusion import Guided, sample
from pretrain.diffusion.ddpm import BETA_END, BETA_START, STEPS
from pretrain.models import DiT, PackedText


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn.

    Attributes:
        objective: flow (Euler) | epsilon (DPM-Solver++).
        steps: evaluations of the backbone.
        guidance: classifier-free guidance scale; 1 is none.
        shift: flow: shift of the times towards noise.
    """

    objective: str
    steps: int
    guidance: float
    shift: float


@dataclass(frozen=True)
class Generated:
    """Latents in fp32, and the query masks of the pictures with text, where the backbone has them."""

    latent_BCHW: Tensor
    masks_BSKN: Tensor | None
    timesteps: tuple[float, ...]


def scheduler(settings: Sampling, device: torch.device) -> Any:
    """diffusers' scheduler of the objective, with its timesteps set."""
    if settings.objective == "flow":
        euler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=settings.shift)
        euler.set_timesteps(sigmas=np.linspace(1.0, 1 / settings.steps, settings.steps), device=device)
        return euler
    solver = DPMSolverMultistepScheduler(
        num_train_timesteps=STEPS, beta_start=BETA_START, beta_end=BETA_END, beta_schedule="linear", solver_order=2
    )
    solver.set_timesteps(settings.steps, device=device)
    return solver


def start_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Normal noise [B, C, H, W], each picture's from its own seed; drawn on the CPU, so the same on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.no_grad()
def generate(
    model: DiT,
    text: PackedText,
    null: PackedText,
    seeds: Sequence[int],
    latent_size: tuple[int, int],
    settings: Sampling,
    keep_masks: bool = False,
) -> Generated:
    """Draws one latent per caption.

    Args:
        text: B captions; `null`: the one empty caption.
        seeds: one per caption.
        latent_size: (H, W) in latent pixels.
    """
    device, dtype = model.final.proj.weight.device, model.final.proj.weight.dtype
    masks: list[Tensor] = []

    def backbone(latent: Tensor, timestep: Tensor, captions: PackedText) -> Tensor:
        prediction = model(latent.to(dtype), timestep, captions)
        if keep_masks and prediction.masks_KBN is not None:
            masks.append(prediction.masks_KBN[:, : len(text)].transpose(0, 1).float().cpu())
        return prediction.sample_BCHW

    steps = scheduler(settings, device)
    guided = Guided(backbone, text.to(device, dtype), null.to(device, dtype), settings.guidance)
    noise = start_noise(seeds, (model.config.latent_channels, *latent_size)).to(device)
    was_training = model.training
    model.eval()
    try:
        latent = sample(guided, noise, steps)
    finally:
        model.train(was_training)
    return Generated(latent, torch.stack(masks, dim=1) if masks else None, tuple(steps.timesteps.tolist()))
