"""Sampling loop, from noise to latents, over a scheduler in diffusers' form (`pretrain/schedulers.py`).

Flow matching: Euler or Euler–Maruyama steps over sigmas 1 … 1/n, shifted. ε-prediction: DPM-Solver++ (arXiv 2211.01095).

Letters: B images, C latent channels, S sampling steps, K blocks, N tokens.

The captions' keys and values are made once; both halves of guidance go through the backbone in one batch, and nothing in
the loop waits for the device, except for `skip`, for a budget rule that watches the pictures (switching.py), which may also
divide the batch, and for a stochastic scheduler's noise that comes from another device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.diffusion.guidance import Guidance, Guided
from pretrain.diffusion.switching import BudgetRule, BudgetSchedule
from pretrain.models.compute_budget import ComputeBudget
from pretrain.models.conditioning import CachedConditioning, Conditioning, TextCache, TimeCache
from pretrain.models.dit import Prediction
from pretrain.models.focusdit.skip import Skip

# Of the noise that a stochastic scheduler draws: one for all pictures, or one for each; None is torch's global one.
Generators = torch.Generator | list[torch.Generator] | None

# Called after each step with its number, its timestep and the latents; gives the latents to go on with, or None to stop there.
OnStep = Callable[[int, Tensor, Tensor], Tensor | None]


class Backbone(Protocol):
    """A backbone as the loop needs it; `DiT` is one."""

    def __call__(
        self, latent: Tensor, conditioning: Conditioning, skip: Skip | None, *, budget: ComputeBudget | None
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
    """Latents in the noise's dtype; the query masks of the pictures with text, if kept; what `skip` left of the FFNs' work.

    `budgets_SB`: each picture's compute budget at each step.
    """

    latent_BCHW: Tensor
    timesteps: tuple[float, ...]
    masks_BSKN: Tensor | None = None
    work: FfnWork | None = None
    budgets_SB: tuple[tuple[ComputeBudget, ...], ...] = ()


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
    """Follows the scheduler's timesteps from noise [B, C, H, W] to latents of the same shape, in the noise's dtype.

    `predict(latent, timestep, t)` is the (guided) backbone, t = timestep / 1000; the scheduler has had its timesteps set.
    """
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    noise = {"generator": generator} if takes_generator else {}
    latent = noise_BCHW
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else the first step asks the device for it
    times = [t / 1000 for t in scheduler.timesteps.tolist()]
    for i, timestep in enumerate(scheduler.timesteps):
        prediction = predict(latent, timestep, times[i]).to(latent.dtype)
        latent = scheduler.step(prediction, timestep, latent, **noise, return_dict=False)[0]
        if on_step is not None:
            changed = on_step(i, timestep, latent)
            if changed is None:
                break
            latent = changed
    return latent


class StepwiseBackbone:
    """A backbone as the loop calls it, one sampling step after the other; records what the result shall hold."""

    def __init__(
        self,
        backbone: Backbone,
        times: Sequence[TimeCache],
        pictures: int,
        dtype: torch.dtype,
        skip: Skip | None,
        keep_masks: bool,
        rule: BudgetRule | None,
        levels: Sequence[float],
    ):
        self.backbone, self.times, self.pictures, self.dtype = backbone, times, pictures, dtype
        self.skip, self.keep_masks = skip, keep_masks
        self.schedule = None if rule is None else BudgetSchedule(rule, pictures)
        self.levels = levels
        self.steps = 0
        self.budgets_SB: list[list[ComputeBudget]] = []
        self._masks: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._tokens: list[list[int]] = []

    def __call__(self, latent: Tensor, timestep: Tensor, captions: TextCache) -> Tensor:
        """The next step's prediction, for the pictures with text, and after them, with guidance, for those without."""
        prediction = self._predict(latent, captions)
        self.steps += 1
        if self.keep_masks and (masks_KBN := prediction.masks_KBN) is not None:
            self._masks.append(masks_KBN[:, : self.pictures].transpose(0, 1).clone())
        if self.skip is not None and prediction.masks:
            self._kept.append(torch.stack([self.skip.keep(m_BN).sum() for m_BN, _ in prediction.masks]))
            self._tokens.append([m_BN.numel() for m_BN, _ in prediction.masks])
        return prediction.sample_BCHW

    def _predict(self, latent: Tensor, captions: TextCache) -> Prediction:
        """One forward pass, or one for each budget among the pictures."""
        inputs, time = latent.to(self.dtype), self.times[self.steps]
        budgets = [time.budget] * self.pictures
        if self.schedule is not None:
            budgets = self.schedule.next(self.levels[self.steps], latent[: self.pictures])
        self.budgets_SB.append(budgets)
        budgets = budgets * (len(latent) // self.pictures)
        different = list(dict.fromkeys(budgets))
        if len(different) == 1:
            return self.backbone(inputs, CachedConditioning(time, captions), self.skip, budget=different[0])
        rows = [[i for i, budget in enumerate(budgets) if budget == one] for one in different]
        parts = [
            copy_of(
                self.backbone(inputs[some], CachedConditioning(time, captions.take(some)), self.skip, budget=budget)
            )
            for some, budget in zip(rows, different, strict=True)
        ]
        return merge_predictions(parts, rows)

    def masks_BSKN(self) -> Tensor | None:
        return torch.stack(self._masks, dim=1).float().cpu() if self._masks else None

    def work(self) -> FfnWork | None:
        return FfnWork(torch.stack(self._kept).cpu(), torch.tensor(self._tokens)) if self._kept else None


def copy_of(prediction: Prediction) -> Prediction:
    """A prediction in memory of its own: compiled as CUDA graphs, the backbone's next call overwrites what this one gave."""
    masks = tuple((m_BN.clone(), grid) for m_BN, grid in prediction.masks)
    return Prediction(prediction.sample_BCHW.clone(), masks, prediction.grid)


def merge_predictions(parts: Sequence[Prediction], rows: Sequence[Sequence[int]]) -> Prediction:
    """Predictions for parts of a batch, on the same grids, as one for all: `rows` are each part's places in the batch."""
    place = torch.tensor([row for some in rows for row in some]).argsort().to(parts[0].sample_BCHW.device)
    masks = tuple(
        (torch.cat([m_BN for m_BN, _ in block])[place], block[0][1])
        for block in zip(*(part.masks for part in parts), strict=True)
    )
    return Prediction(torch.cat([part.sample_BCHW for part in parts])[place], masks, parts[0].grid)


def generate(
    backbone: Backbone,
    text: TextCache,
    null: TextCache,
    times: Sequence[TimeCache],
    noise_BCHW: Tensor,
    scheduler: Any,
    guidance: Guidance,
    dtype: torch.dtype,
    skip: Skip | None = None,
    keep_masks: bool = False,
    on_step: OnStep | None = None,
    generator: Generators = None,
    rule: BudgetRule | None = None,
) -> Generated:
    """Draws one latent per caption.

    Args:
        text, null: B captions, and one null text for all or one for each, from the backbone's `encode_text`.
        times: the scheduler's timesteps, from the backbone's `embed_times`.
        noise_BCHW: starting noise, in the dtype of all latents; `dtype` is what the backbone computes in.
        skip: leaves out FFNs where the query mask weighs them little.
        keep_masks: give the query masks of each step.
        generator: of a stochastic scheduler's noise.
        rule: each picture's compute budget at each step; by default that of the noise level.
    """
    levels = [] if rule is None else (scheduler.timesteps / 1000).tolist()
    stepwise = StepwiseBackbone(backbone, times, len(text), dtype, skip, keep_masks, rule, levels)
    latent = sample(Guided(stepwise, text, null, guidance), noise_BCHW, scheduler, on_step, generator)
    timesteps = tuple(scheduler.timesteps.tolist()[: stepwise.steps])
    return Generated(latent, timesteps, stepwise.masks_BSKN(), stepwise.work(), tuple(map(tuple, stepwise.budgets_SB)))
