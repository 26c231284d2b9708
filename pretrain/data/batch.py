"""One sample as it is read, and the micro-batch that is made of several.

Letters: B samples of a micro-batch, C latent channels, E text width, M text tokens of a micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from data_prep.schema import Latent
from pretrain.diffusion import captions_dropped
from pretrain.distributed import torch_private
from pretrain.models import PackedText

if TYPE_CHECKING:  # it imports streaming, which takes seconds
    from pretrain.data.shard_reader import UnreadableSample


@dataclass(frozen=True)
class Sample:
    """One sample of the data set.

    Attributes:
        key: its name in the data set.
        seed: the seed of all its random numbers in this epoch.
        text: its caption's embedding [L, E], L tokens of it.
        latent: the VAE's posterior.
        source: the number of its source, in the order of their names.
        features: the vision encoder's [h, w, F] in fp16, where the run uses them.
        damaged: the samples that it stands in for, as they cannot be read.
    """

    key: str
    seed: int
    text: Tensor
    latent: Latent
    source: int = 0
    damaged: tuple[UnreadableSample, ...] = ()
    features: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        keys, seeds: the samples' names, and the seeds of all their random numbers.
        text: the captions' embeddings, the null text's where a caption is dropped; M tokens of width E.
        mean_BCHW, std_BCHW: the VAE's posteriors in fp16; std_BCHW is None where the data set keeps the means alone.
        sources: the numbers of the samples' sources.
        damaged: samples that belong into it, but could not be read: other samples of their sets are in their places.
        features_BhwF: the vision encoder's features in fp16; None where the run does not use them.
    """

    keys: tuple[str, ...]
    seeds: tuple[int, ...]
    text: PackedText
    mean_BCHW: Tensor
    std_BCHW: Tensor | None
    sources: tuple[int, ...] = ()
    damaged: tuple[UnreadableSample, ...] = ()
    features_BhwF: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The batch on a device, the text in `dtype`, the latents in fp32 (half of that is copied: they are cast there)."""
        std = self.std_BCHW if self.std_BCHW is None else self.std_BCHW.to(device, non_blocking=True).float()
        mean = self.mean_BCHW.to(device, non_blocking=True).float()
        features = (
            self.features_BhwF if self.features_BhwF is None else self.features_BhwF.to(device, non_blocking=True)
        )
        return replace(self, text=self.text.to(device, dtype), mean_BCHW=mean, std_BCHW=std, features_BhwF=features)

    def pin_memory(self) -> Batch:
        """The batch in pinned host memory; torch's DataLoader calls it by this name."""
        std = self.std_BCHW if self.std_BCHW is None else self.std_BCHW.pin_memory()
        features = self.features_BhwF if self.features_BhwF is None else self.features_BhwF.pin_memory()
        return replace(
            self,
            text=self.text.pin_memory(),
            mean_BCHW=self.mean_BCHW.pin_memory(),
            std_BCHW=std,
            features_BhwF=features,
        )

    def latent(self, posterior_BCHW: Tensor) -> Tensor:
        """A fresh sample of the VAE's posterior [B, C, H, W] from standard normal numbers."""
        return self.mean_BCHW if self.std_BCHW is None else self.mean_BCHW + self.std_BCHW * posterior_BCHW


@dataclass(frozen=True)
class Collate:
    """Makes micro-batches of `micro` samples from the samples of one optimizer step.

    Captions are dropped with the probability `dropout`, by the samples' seeds: `null_text` [L, E], the embedding of the
    empty caption, takes their places. `multiple` is that of `PackedText.pack`.
    """

    micro: int
    null_text: Tensor
    dropout: float
    multiple: int | None = None

    def __call__(self, samples: list[Sample]) -> list[Batch]:
        if self.dropout:
            dropped = captions_dropped([s.seed for s in samples], self.dropout)
            samples = [replace(s, text=self.null_text) if d else s for s, d in zip(samples, dropped, strict=True)]
        return [self._batch(samples[i : i + self.micro]) for i in range(0, len(samples), self.micro)]

    def _batch(self, samples: list[Sample]) -> Batch:
        stds = [s.latent.std[None] for s in samples if s.latent.std is not None]
        features = [s.features[None] for s in samples if s.features is not None]
        return Batch(
            keys=tuple(s.key for s in samples),
            seeds=tuple(s.seed for s in samples),
            text=PackedText.pack([s.text[:, :0] for s in samples], self.multiple).with_tokens(
                concatenate([s.text for s in samples])
            ),
            mean_BCHW=concatenate([s.latent.mean[None] for s in samples]),
            std_BCHW=concatenate(stds) if stds else None,
            sources=tuple(s.source for s in samples),
            damaged=tuple(unreadable for s in samples for unreadable in s.damaged),
            features_BhwF=concatenate(features) if features else None,
        )


def concatenate(parts: list[Tensor]) -> Tensor:
    """Joins the parts along their first dimension; in a worker in shared memory, so that they are not copied to be sent."""
    out = None
    if get_worker_info() is not None:
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        storage = torch_private.new_shared_storage(math.prod(shape) * parts[0].element_size())
        out = torch.empty(0, dtype=parts[0].dtype).set_(storage).view(shape)
    return torch.cat(parts, out=out)
