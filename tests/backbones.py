"""Helpers of tests of the backbone: forward passes as training and as sampling make them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.models import CachedConditioning, DiT, PackedText, Prediction


def predict(model: DiT, latent: Tensor, timestep: Tensor, text: PackedText, *given: Any, **more: Any) -> Prediction:
    """A forward pass as in training: a timestep and a caption for each latent."""
    return model(latent, model.condition(timestep, text), *given, **more)


def predict_cached(
    model: DiT, latent: Tensor, timestep: Tensor | float, text: PackedText, *given: Any, **more: Any
) -> Prediction:
    """A forward pass as in sampling: one timestep for all latents, from caches."""
    (time,) = model.embed_times(torch.as_tensor(timestep).flatten()[:1])
    return model(latent, CachedConditioning(time, model.encode_text(text)), *given, **more)
