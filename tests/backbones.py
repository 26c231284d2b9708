"""Helpers of tests of the backbone: forward passes as training and as sampling make them, and the memory that they keep."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.models import CachedConditioning, DiT, DiTConfig, PackedText, Prediction


def build(config: DiTConfig) -> DiT:
    """A backbone whose parameters are all a little off their start, as a fresh block changes nothing."""
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def predict(model: DiT, latent: Tensor, timestep: Tensor, text: PackedText, *given: Any, **more: Any) -> Prediction:
    """A forward pass as in training: a timestep and a caption for each latent."""
    return model(latent, model.condition(timestep, text), *given, **more)


def predict_cached(
    model: DiT, latent: Tensor, timestep: Tensor | float, text: PackedText, *given: Any, **more: Any
) -> Prediction:
    """A forward pass as in sampling: one timestep for all latents, from caches."""
    (time,) = model.embed_times(torch.as_tensor(timestep).flatten()[:1])
    return model(latent, CachedConditioning(time, model.encode_text(text)), *given, **more)


class Storages(TorchDispatchMode):
    """The storages that operations make, by weak references: those still alive are kept by someone."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.made[id(storage)] = weakref.ref(storage)
        return out

    def alive(self) -> int:
        """Bytes of the storages that are still there."""
        return sum(storage.nbytes() for made in self.made.values() if (storage := made()) is not None)
