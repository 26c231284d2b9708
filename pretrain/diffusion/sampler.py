"""From noise to latents: a loop over a scheduler in diffusers' form, which `pretrain/schedulers.py` brings.

Flow matching: Euler or Euler–Maruyama steps over sigmas 1 … 1/n, shifted. ε-prediction: DPM-Solver++ (arXiv 2211.01095).

Letters: B images, C latent channels, S sampling steps, K blocks, N tokens.

The captions' keys and values are made once; both halves of guidance go through the backbone in one batch, and nothing in
the loop waits for the device, except for `skip`, for mediators that switch (mediators.py), which may also divide the
batch, and for a stochastic scheduler's noise that comes from another device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.diffusion.guidance import Guidance, Guided
from pretrain.diffusion.switching import Course, Rule
from pretrain.models.block import TimeMemory
from pretrain.models.budget import Effort
from pretrain.models.dit import Prediction
from pretrain.models.focusdit.skip import Skip
from pretrain.models.text import TextMemory

# Of the noise that a stochastic scheduler draws: one for all pictures, or one for each; None is torch's global one.
Generators = torch.Generator | list[torch.Generator] | None

# Called after each step with its number, its timestep and the latents; gives the latents to go on with, or None to stop there.
OnStep = Callable[[int, Tensor, Tensor], Tensor | None]


class Backbone(Protocol):
    """What the loop asks of a backbone; `DiT` is one."""

    def __call__(
        self, latent: Tensor, timestep: TimeMemory, text: TextMemory, skip: Skip | None, *, effort: Effort | None
    ) -> Prediction: ...


@dataclass(frozen=True)
class FfnWork:
    """Tokens kept for each block's FFN at each step [S, K] (a pruned block has none to go through), of `tokens_SK` in all.

    They are those of both halves of guidance.
    """

    kept_SK: Tensor
    tokens_SK: Tensor


@dataclass(frozen=True)
class Generated:
    """Latents in fp32; the query masks of the pictures with text, if kept; what `skip` left of the FFNs' work.

    `mediators_BS`: how many each picture had at each step, where there was a rule for them.
    """

    latent_BCHW: Tensor
    timesteps: tuple[float, ...]
    masks_BSKN: Tensor | None = None
    work: FfnWork | None = None
    mediators_BS: Tensor | None = None


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


class Asked:
    """The backbone as the loop asks it, one step after the other, and what is kept of its answers."""

    def __init__(
        self,
        backbone: Backbone,
        times: Sequence[TimeMemory],
        pictures: int,
        dtype: torch.dtype,
        skip: Skip | None,
        keep_masks: bool,
        mediators: Rule | None,
        levels: Sequence[float],
    ):
        self.backbone, self.times, self.pictures, self.dtype = backbone, times, pictures, dtype
        self.skip, self.keep_masks = skip, keep_masks
        self.course = None if mediators is None else Course(mediators, pictures)
        self.levels = levels
        self.steps = 0
        self._masks: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._tokens: list[list[int]] = []

    def __call__(self, latent: Tensor, timestep: Tensor, captions: TextMemory) -> Tensor:
        """The next step's prediction, for the pictures with text, and after them, with guidance, for those without."""
        prediction = self._predict(latent, captions)
        self.steps += 1
        if self.keep_masks and (masks_KBN := prediction.masks_KBN) is not None:
            self._masks.append(masks_KBN[:, : self.pictures].transpose(0, 1).clone())
        if self.skip is not None and prediction.masks:
            self._kept.append(torch.stack([self.skip.keep(m_BN).sum() for m_BN, _ in prediction.masks]))
            self._tokens.append([m_BN.numel() for m_BN, _ in prediction.masks])
        return prediction.sample_BCHW

    def _predict(self, latent: Tensor, captions: TextMemory) -> Prediction:
        """One forward pass, or one for each effort among the pictures."""
        inputs, times = latent.to(self.dtype), self.times[self.steps]
        if self.course is None:
            return self.backbone(inputs, times, captions, self.skip, effort=None)
        efforts = self.course.next(self.levels[self.steps], latent[: self.pictures])
        efforts *= len(latent) // self.pictures
        different = list(dict.fromkeys(efforts))
        if len(different) == 1:
            return self.backbone(inputs, times, captions, self.skip, effort=different[0])
        rows = [[i for i, effort in enumerate(efforts) if effort == one] for one in different]
        parts = [
            copied(self.backbone(inputs[some], times, captions.take(some), self.skip, effort=effort))
            for some, effort in zip(rows, different, strict=True)
        ]
        return together(parts, rows)

    def masks_BSKN(self) -> Tensor | None:
        return torch.stack(self._masks, dim=1).float().cpu() if self._masks else None

    def work(self) -> FfnWork | None:
        return FfnWork(torch.stack(self._kept).cpu(), torch.tensor(self._tokens)) if self._kept else None

    def mediators_BS(self) -> Tensor | None:
        return None if self.course is None else torch.tensor(self.course.numbers_SB).T


def copied(prediction: Prediction) -> Prediction:
    """In memory of its own: compiled as CUDA graphs, the backbone's next call overwrites what this one gave."""
    masks = tuple((m_BN.clone(), grid) for m_BN, grid in prediction.masks)
    return Prediction(prediction.sample_BCHW.clone(), masks, prediction.grid)


def together(parts: Sequence[Prediction], rows: Sequence[Sequence[int]]) -> Prediction:
    """Predictions for parts of a batch, at one density, as one for all: `rows` are each part's places in the batch."""
    place = torch.tensor([row for some in rows for row in some]).argsort().to(parts[0].sample_BCHW.device)
    masks = tuple(
        (torch.cat([m_BN for m_BN, _ in block])[place], block[0][1])
        for block in zip(*(part.masks for part in parts), strict=True)
    )
    return Prediction(torch.cat([part.sample_BCHW for part in parts])[place], masks, parts[0].grid)


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
    mediators: Rule | None = None,
) -> Generated:
    """Draws one latent per caption.

    Args:
        text: B captions, read by the backbone; `null`: one for all, or one for each.
        times: the scheduler's timesteps, read by the backbone.
        noise_BCHW: where they start, in fp32; `dtype` is what the backbone computes in.
        skip: leaves out FFNs where the query mask weighs them little.
        keep_masks: give the query masks of each step.
        generator: of a stochastic scheduler's noise.
        mediators: how many each picture has at each step; None leaves it to the backbone.
    """
    levels = [] if mediators is None else (scheduler.timesteps / 1000).tolist()
    asked = Asked(backbone, times, len(text), dtype, skip, keep_masks, mediators, levels)
    latent = sample(Guided(asked, text, null, guidance), noise_BCHW, scheduler, on_step, generator)
    timesteps = tuple(scheduler.timesteps.tolist()[: asked.steps])
    return Generated(latent, timesteps, asked.masks_BSKN(), asked.work(), asked.mediators_BS())
