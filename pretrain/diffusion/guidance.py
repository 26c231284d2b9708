"""Classifier-free guidance (arXiv 2207.12598): the null text is the encoded empty caption."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.models.text import PackedText


class Guided:
    """Predicts `null + scale · (text − null)`, both halves in one batch; a scale of 1 needs no null half."""

    def __init__(
        self, backbone: Callable[[Tensor, Tensor, PackedText], Tensor], text: PackedText, null: PackedText, scale: float
    ):
        self.backbone = backbone
        self.scale = scale
        self.text = text if scale == 1 else text + null * len(text)

    def __call__(self, latent_BCHW: Tensor, timestep: Tensor) -> Tensor:
        """Latents [B, C, H, W] at one timestep (a scalar in 0..1000) to the guided prediction."""
        times = 1 if self.scale == 1 else 2
        latent = latent_BCHW.repeat(times, 1, 1, 1)
        output = self.backbone(latent, timestep.expand(len(latent)), self.text)
        if times == 1:
            return output
        with_text, without = output.chunk(2)
        return torch.lerp(without, with_text, self.scale)
