"""Micro-batches of samples: what goes in comes out, in order; on a device; in shared memory in a worker."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep.schema import Latent
from pretrain.data.batch import Batch, Collate, Sample, concatenate
from pretrain.data.shard_reader import UnreadableSample

CPU = torch.device("cpu")
NULL = torch.full((1, 5), 7.0).bfloat16()


def sample(i: int, std: bool = True, damaged: tuple[UnreadableSample, ...] = ()) -> Sample:
    generator = torch.Generator().manual_seed(i)
    mean = torch.randn(4, 2, 6, generator=generator).half()
    deviation = torch.rand(4, 2, 6, generator=generator).half() if std else None
    text = torch.randn(1 + i % 3, 5, generator=generator).bfloat16()
    return Sample(f"a/{i}", 100 + i, text, Latent(mean, deviation), i % 2, damaged)


def collate(micro: int, samples: list[Sample], dropout: float = 0) -> list[Batch]:
    return Collate(micro, NULL, dropout)(samples)


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize(("count", "micro", "sizes"), [(6, 2, [2, 2, 2]), (5, 2, [2, 2, 1]), (3, 8, [3])])
def test_micro_batches_in_order(count: int, micro: int, sizes: list[int], std: bool) -> None:
    samples = [sample(i, std) for i in range(count)]
    batches = collate(micro, samples)
    assert [len(b.keys) for b in batches] == sizes
    assert [key for b in batches for key in b.keys] == [s.key for s in samples]
    assert [seed for b in batches for seed in b.seeds] == [s.seed for s in samples]
    captions = [c for b in batches for c in b.text.captions()]
    assert all(torch.equal(c, s.text) for c, s in zip(captions, samples, strict=True))
    means = torch.cat([b.mean_BCHW for b in batches])
    assert torch.equal(means, torch.stack([s.latent.mean for s in samples])) and means.dtype == torch.float16
    for batch, first in zip(batches, range(0, count, micro), strict=True):
        if not std:
            assert batch.std_BCHW is None
        else:
            stds = [s.latent.std for s in samples[first : first + micro] if s.latent.std is not None]
            assert batch.std_BCHW is not None and torch.equal(batch.std_BCHW, torch.stack(stds))


def test_captions_are_dropped_at_random() -> None:
    """The share that is asked for, by each sample's seed alone; the rest of the sample stays."""
    samples = [sample(i) for i in range(300)]

    def dropped(samples: list[Sample], dropout: float) -> set[str]:
        batches = collate(7, samples, dropout)
        texts = [text for b in batches for text in b.text.captions()]
        keys = [key for b in batches for key in b.keys]
        kept = {s.key: s.text for s in samples}
        gone = {key for key, text in zip(keys, texts, strict=True) if torch.equal(text, NULL)}
        assert all(torch.equal(t, kept[k]) for k, t in zip(keys, texts, strict=True) if k not in gone)
        means = torch.cat([b.mean_BCHW for b in batches])
        assert torch.equal(means, torch.stack([s.latent.mean for s in samples]))
        return gone

    assert dropped(samples, 0) == set()
    some = dropped(samples, 0.3)
    assert 60 < len(some) < 120  # four standard deviations: 8 each
    assert dropped(samples[::-3], 0.3) == some & {s.key for s in samples[::-3]}
    assert some < dropped(samples, 0.6)  # a larger share drops those, too
    assert len(dropped(samples, 1)) == 300
    again = [replace(s, seed=s.seed + 1000) for s in samples]
    assert dropped(again, 0.3) != some


def test_damaged_samples_of_all_of_its_samples() -> None:
    lost = [UnreadableSample("a/256/x.mds", i, "why") for i in range(3)]
    samples = [sample(0, damaged=(lost[0], lost[1])), sample(1), sample(2, damaged=(lost[2],))]
    assert [b.damaged for b in collate(2, samples)] == [(lost[0], lost[1]), (lost[2],)]


def test_on_a_device() -> None:
    """The text in the asked dtype, latents in fp32, all else as it was."""
    (batch,) = collate(3, [sample(i) for i in range(3)])
    moved = batch.to(CPU, torch.float32)
    assert moved.text.tokens_ME.dtype == torch.float32 and torch.equal(
        moved.text.tokens_ME.bfloat16(), batch.text.tokens_ME
    )
    assert moved.mean_BCHW.dtype == torch.float32 and torch.equal(moved.mean_BCHW, batch.mean_BCHW.float())
    assert batch.std_BCHW is not None and moved.std_BCHW is not None
    assert torch.equal(moved.std_BCHW, batch.std_BCHW.float())
    assert (moved.keys, moved.seeds, moved.damaged) == (batch.keys, batch.seeds, batch.damaged)
    (means,) = collate(3, [sample(i, std=False) for i in range(3)])
    assert means.to(CPU, torch.bfloat16).std_BCHW is None


def test_latents_of_the_posterior() -> None:
    """mean + std · noise in fp32; the mean alone where no deviation is kept."""
    batch = collate(2, [sample(0), sample(1)])[0].to(CPU, torch.float32)
    noise = torch.randn_like(batch.mean_BCHW)
    assert batch.std_BCHW is not None
    assert torch.equal(batch.latent(noise), batch.mean_BCHW + batch.std_BCHW * noise)
    assert torch.equal(batch.latent(torch.zeros_like(noise)), batch.mean_BCHW)
    means = collate(2, [sample(0, std=False), sample(1, std=False)])[0].to(CPU, torch.float32)
    assert torch.equal(means.latent(noise), means.mean_BCHW)


class Samples(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Sample:
        return sample(i)


class Shared:
    """A collate function that tells whether its batch's tensors are in shared memory where they are made."""

    def __call__(self, samples: list[Sample]) -> tuple[Batch, list[bool]]:
        (batch,) = collate(4, samples)
        assert batch.std_BCHW is not None
        return batch, [t.is_shared() for t in (batch.text.tokens_ME, batch.mean_BCHW, batch.std_BCHW)]


@pytest.mark.parametrize("workers", [0, 1])
def test_shared_memory_in_a_worker_alone(workers: int) -> None:
    """The same batch either way; in a worker it is made in shared memory, so that it is not copied to be sent."""
    ((batch, shared),) = DataLoader(Samples(), batch_size=4, collate_fn=Shared(), num_workers=workers)
    assert shared == [workers > 0] * 3
    (expected,) = collate(4, [sample(i) for i in range(4)])
    assert torch.equal(batch.mean_BCHW, expected.mean_BCHW) and torch.equal(batch.std_BCHW, expected.std_BCHW)
    assert torch.equal(batch.text.tokens_ME, expected.text.tokens_ME) and batch.text.lengths == expected.text.lengths


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_concatenate(dtype: torch.dtype) -> None:
    parts: list[Tensor] = [torch.randn(n, 3, 2).to(dtype) for n in (1, 4, 2)]
    assert torch.equal(concatenate(parts), torch.cat(parts))
