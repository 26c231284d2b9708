"""From noise to latents: a loop over a scheduler in diffusers' form, which `pretrain/schedulers.py` brings.

Flow matching: Euler or Euler–Maruyama steps over sigmas 1 … 1/n, shifted. ε-prediction: DPM-Solver++ (arXiv 2211.01095).

Letters: B images, C latent channels, S sampling steps, K blocks, N tokens.

The captions' keys and values are made once; both halves of guidance go through the backbone in one batch, and without
`skip` nothing in the loop waits for the device, unless a stochastic scheduler's noise comes from another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.diffusion.guidance import Guidance, Guided
from pretrain.models.block import TimeMemory
from pretrain.models.dit import Prediction
from pretrain.models.skip import Skip
from pretrain.models.text import TextMemory

# Of the noise that a stochastic scheduler draws: one for all pictures, or one for each; None is torch's global one.
Generators = torch.Generator | list[torch.Generator] | None

# Called after each step with its number, its timestep and the latents; gives the latents to go on with, or None to stop there.
OnStep = Callable[[int, Tensor, Tensor], Tensor | None]


class Backbone(Protocol):
    """What the loop asks of a backbone; `DiT` is one."""

    def __call__(self, latent: Tensor, timestep: TimeMemory, text: TextMemory, skip: Skip | None) -> Prediction: ...


@dataclass(frozen=True)
class FfnWork:
    """Tokens kept for each block's FFN at each step [S, K] (a pruned block has none to go through), of `tokens_SK` in all.

    They are those of both halves of guidance.
    """

    kept_SK: Tensor
    tokens_SK: Tensor


@dataclass(frozen=True)
class Generated:
    """Latents in fp32; the query masks of the pictures with text, if kept; what `skip` left of the FFNs' work."""

    latent_BCHW: Tensor
    timesteps: tuple[float, ...]
    masks_BSKN: Tensor | None = None
    work: FfnWork | None = None


def start_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Normal noise [B, C, H, W], each picture's from its own seed; drawn on the CPU, so the same on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Tensor, float], Tensor],
    noise_BCHW: Tensor,
    scheduler: Any,
    on_step: OnStep | None = None,
    generator: Generators = None,
) -> Tensor:
    """Follows the scheduler's timesteps from noise [B, C, H, W] to latents of the same shape, in fp32.

    `predict(latent, timestep, t)` is the (guided) backbone; the scheduler has had its timesteps set.
    """
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    noise = {"generator": generator} if takes_generator else {}
    latent = noise_BCHW
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else the first step asks the device for it
    times = [t / 1000 for t in scheduler.timesteps.tolist()]
    for i, timestep in enumerate(scheduler.timesteps):
        prediction = predict(latent, timestep, times[i]).float()
        latent = scheduler.step(prediction, timestep, latent, **noise, return_dict=False)[0]
        if on_step is not None:
            changed = on_step(i, timestep, latent)
            if changed is None:
                break
            latent = changed
    return latent


def generate(
    backbone: Backbone,
    text: TextMemory,
    null: TextMemory,
    times: Sequence[TimeMemory],
    noise_BCHW: Tensor,
    scheduler: Any,
    guidance: Guidance,
    dtype: torch.dtype,
    skip: Skip | None = None,
    keep_masks: bool = False,
    on_step: OnStep | None = None,
    generator: Generators = None,
) -> Generated:
    """Draws one latent per caption.

    Args:
        text: B captions, read by the backbone; `null`: one for all, or one for each.
        times: the scheduler's timesteps, read by the backbone.
        noise_BCHW: where they start, in fp32; `dtype` is what the backbone computes in.
        skip: leaves out FFNs where the query mask weighs them little.
        keep_masks: give the query masks of each step.
        generator: of a stochastic scheduler's noise.
    """
    masks: list[Tensor] = []
    kept: list[Tensor] = []
    tokens: list[list[int]] = []
    steps = 0

    def predict(latent: Tensor, timestep: Tensor, captions: TextMemory) -> Tensor:
        nonlocal steps
        steps += 1
        prediction = backbone(latent.to(dtype), times[steps - 1], captions, skip)
        if keep_masks and (masks_KBN := prediction.masks_KBN) is not None:
            masks.append(masks_KBN[:, : len(text)].transpose(0, 1).clone())
        if skip is not None and prediction.masks:
            kept.append(torch.stack([skip.keep(m_BN).sum() for m_BN, _ in prediction.masks]))
            tokens.append([m_BN.numel() for m_BN, _ in prediction.masks])
        return prediction.sample_BCHW

    latent = sample(Guided(predict, text, null, guidance), noise_BCHW, scheduler, on_step, generator)
    return Generated(
        latent,
        tuple(scheduler.timesteps.tolist()[:steps]),
        torch.stack(masks, dim=1).float().cpu() if masks else None,
        FfnWork(torch.stack(kept).cpu(), torch.tensor(tokens)) if kept else None,
    )
