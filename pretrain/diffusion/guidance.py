"""Classifier-free guidance (arXiv 2207.12598), where asked within an interval of noise levels only (arXiv 2404.07724).

The null text is the encoded empty caption, or a negative prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pretrain.models.conditioning import TextCache
from pretrain.models.text import PackedText

Captions = TypeVar("Captions", PackedText, TextCache)


@dataclass(frozen=True)
class Guidance:
    """Scale and interval of guidance: `scale` 1 is none; `interval` is of t = timestep / 1000, from 0 (data) to 1 (noise)."""

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance scale {self.scale}: expected a number")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"guidance interval {self.interval}: expected two times in 0..1, the first not above the second"
            )

    def at(self, t: float) -> bool:
        """True where the null half is needed at t."""
        low, high = self.interval
        return self.scale != 1 and low - 1e-6 <= t <= high + 1e-6  # t comes from timesteps in fp32


class Guided(Generic[Captions]):
    """Predicts `null + scale · (text − null)`, both halves in one batch; where there is no guidance, the text half alone."""

    def __init__(
        self,
        backbone: Callable[[Tensor, Tensor, Captions], Tensor],
        text: Captions,
        null: Captions,
        guidance: Guidance,
    ):
        """`null`: one caption for all, or one for each of `text`."""
        self.backbone: Callable[[Tensor, Tensor, Captions], Tensor] = backbone
        self.text: Captions = text
        self.guidance = guidance
        if guidance.scale != 1:
            self.both: Captions = text + (null if len(null) == len(text) else null * len(text))

    def __call__(self, latent_BCHW: Tensor, timestep: Tensor, t: float) -> Tensor:
        """Latents [B, C, H, W] at one timestep (a scalar in 0..1000; t is the same in 0..1, on the host) to the prediction."""
        if not self.guidance.at(t):
            return self.backbone(latent_BCHW, timestep.expand(len(latent_BCHW)), self.text)
        latent = latent_BCHW.repeat(2, 1, 1, 1)
        with_text, without = self.backbone(latent, timestep.expand(len(latent)), self.both).chunk(2)
        return torch.lerp(without, with_text, self.guidance.scale)
