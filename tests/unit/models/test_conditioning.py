"""Caches of text and time, put together; and what training's conditioning keeps in memory."""

from itertools import combinations

import pytest
import torch
from backbones import Storages, predict

from pretrain.models import CachedConditioning, DiT, DiTConfig, PackedText, TextCache
from pretrain.models.conditioning import Segment
from pretrain.models.mixers.mediators import MediatorsSection

LENGTHS = (3, 1, 5, 2)


def make(lengths=LENGTHS, width=4, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator) for n in lengths]


def cache_of(*runs: tuple[int, int]) -> TextCache:
    """Random keys and values of two blocks, for runs of (captions, their length)."""
    blocks = (tuple(Segment(torch.randn(b, 2, n, 3), torch.randn(b, 2, n, 3)) for b, n in runs) for _ in range(2))
    return TextCache(tuple(blocks), sum(b for b, _ in runs))


def test_text_caches_are_added_block_by_block():
    first, second = cache_of((2, 3), (1, 5)), cache_of((4, 1))
    both = first + second
    assert (len(first), len(second), len(both)) == (3, 4, 7)
    for block in range(2):
        assert both.blocks[block] == (*first.blocks[block], *second.blocks[block])


def test_a_cache_of_one_caption_is_repeated_without_a_copy():
    one = cache_of((1, 4))
    many = one * 3
    assert len(many) == 3
    for (before,), (after,) in zip(one.blocks, many.blocks, strict=True):
        for tensor, repeated in zip((before.keys, before.values), (after.keys, after.values), strict=True):
            assert torch.equal(repeated, torch.cat([tensor] * 3))
            assert repeated.data_ptr() == tensor.data_ptr()
    with pytest.raises(AssertionError, match="single caption"):
        many * 2


SMALL = DiTConfig(width=24, heads=2, depth=2, patch=2, latent_channels=3, text_width=4, mask_hidden=(8,))


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(3, 1, 5, 2), (4, 4, 4, 4), (2, 2, 5, 5)])
def test_some_of_the_captions_are_what_encoding_them_alone_gives(lengths):
    torch.manual_seed(0)
    model, captions = DiT(SMALL), make(lengths)
    cache = model.encode_text(PackedText.pack(captions))
    for wanted in (w for number in range(1, 5) for w in combinations(range(4), number)):
        taken, alone = cache.take(wanted), model.encode_text(PackedText.pack([captions[n] for n in wanted]))
        assert len(taken) == len(wanted)
        for mine, others in zip(taken.blocks, alone.blocks, strict=True):
            for part in ("keys", "values"):
                caption_by_caption = [[c for s in segments for c in getattr(s, part)] for segments in (mine, others)]
                for got, expected in zip(*caption_by_caption, strict=True):
                    torch.testing.assert_close(got, expected)


def test_all_captions_are_taken_without_a_copy():
    cache = cache_of((2, 3), (1, 5))
    for mine, others in zip(cache.take(range(3)).blocks, cache.blocks, strict=True):
        assert all(kept is given for kept, given in zip(mine, others, strict=True))
    assert [len(segments) for segments in cache.take([2]).blocks] == [1, 1]


@pytest.mark.parametrize("wanted", [(1, 0), (0, 0), (1, 3), (-1, 0)])
def test_taking_what_cannot_be_kept_in_order_is_an_error(wanted):
    with pytest.raises(AssertionError, match="of 3"):
        cache_of((2, 3), (1, 5)).take(wanted)


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"mask": "release", "ffn": "shared"}, {"attention": "mediators"}])
def test_without_text_captions_change_nothing(change):
    """An unconditional model has no parameters of text; captions are counted only."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(**{**vars(SMALL), "text_width": 0, "mediators": MediatorsSection((1, 4)), **change}))
    assert not [name for name, _ in model.named_parameters() if "cross" in name or "text" in name]
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    latent, timestep = torch.randn(3, 3, 8, 12), torch.full((3,), 400.0)
    text = PackedText.pack(make((3, 1, 5)))
    expected = predict(model, latent, timestep, text).sample_BCHW
    assert torch.equal(predict(model, latent, timestep, PackedText.pack(make((2, 2, 2), seed=1))).sample_BCHW, expected)

    cache, (time,) = model.encode_text(text), model.embed_times(torch.tensor([400.0]))
    assert len(cache) == 3
    for some in (cache, cache.take([0, 2]) + cache.take([1]), cache.take([1]) * 3):
        torch.testing.assert_close(model(latent, CachedConditioning(time, some)).sample_BCHW, expected)
    with pytest.raises(ValueError, match="3 latents and the conditioning of 2 do not match"):
        model(latent, CachedConditioning(time, cache.take([0, 2])))


def test_recomputing_keeps_no_blocks_keys_and_values():
    """Between forward and backward pass, the bytes that longer captions add are the projected captions', whatever the depth.

    Live storages are counted: `saved_tensors_hooks` do not see what a recomputed block's inputs hold.
    """
    images, width, lengths = 2, 32, (20, 60)

    def added(depth: int, recompute: bool) -> int:
        kept = []
        for length in lengths:
            model = DiT(DiTConfig(width=width, heads=2, depth=depth, patch=2, latent_channels=3, text_width=16))
            model.recompute = recompute
            text = PackedText.pack([torch.randn(length, 16) for _ in range(images)])
            with Storages() as storages:
                prediction = predict(model, torch.randn(images, 3, 8, 8), torch.full((images,), 400.0), text)
            kept.append(storages.alive())
            assert prediction.sample_BCHW.requires_grad  # held until here, and with it the graph
        return kept[1] - kept[0]

    one_block = images * (lengths[1] - lengths[0]) * 2 * width * 4  # keys and values in fp32
    assert added(6, recompute=False) - added(2, recompute=False) >= 4 * one_block, "all blocks' are kept without it"
    assert added(6, recompute=True) == added(2, recompute=True) > 0
