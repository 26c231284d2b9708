"""PackedText: captions of unequal length without padding."""

import pytest
import torch

from pretrain.models import PackedText

LENGTHS = (3, 1, 5, 2)


def make(lengths=LENGTHS, width=4, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator) for n in lengths]


def same(packed: PackedText, captions: list[torch.Tensor]) -> bool:
    """Whether `packed` holds these captions, in values and in every field of its layout."""
    fresh = PackedText.pack(captions)
    keeps = [packed.keep_BL, fresh.keep_BL]
    keep_is_same = keeps == [None, None] if None in keeps else torch.equal(*keeps)
    return (
        packed.lengths == fresh.lengths
        and torch.equal(packed.tokens_ME, fresh.tokens_ME)
        and torch.equal(packed.slot_M, fresh.slot_M)
        and torch.equal(packed.starts, fresh.starts)
        and keep_is_same
    )


@pytest.mark.parametrize("lengths", [LENGTHS, (4, 4, 4), (6,)])
def test_packs_end_to_end_and_pads(lengths):
    captions = make(lengths)
    text = PackedText.pack(captions)
    assert len(text) == len(lengths)
    assert text.lengths == lengths
    assert torch.equal(text.tokens_ME, torch.cat(captions))
    for got, given in zip(text.captions(), captions, strict=True):
        assert torch.equal(got, given)

    padded = torch.zeros(len(lengths), max(lengths), 4)
    for row, caption in zip(padded, captions, strict=True):
        row[: len(caption)] = caption
    assert torch.equal(text.pad(text.tokens_ME), padded)
    assert torch.equal(padded.flatten(0, 1)[text.slot_M], text.tokens_ME)


def test_keep_marks_the_real_tokens():
    text = PackedText.pack(make())
    assert text.keep_BL.int().sum(1).tolist() == list(LENGTHS)
    assert torch.equal(text.keep_BL, text.keep_BL.sort(dim=1, descending=True).values)
    assert PackedText.pack(make((4, 4))).keep_BL is None


@pytest.mark.parametrize("lengths", [LENGTHS, (4, 4), (8,), (9, 2)])
def test_the_rectangle_is_rounded_up_and_then_always_masked(lengths):
    text, plain = PackedText.pack(make(lengths), multiple=8), PackedText.pack(make(lengths))
    longest, L = max(lengths), 16 if max(lengths) > 8 else 8
    assert text.keep_BL.shape == (len(lengths), L)
    assert text.keep_BL.sum(1).tolist() == list(lengths)
    padded = text.pad(text.tokens_ME)
    assert torch.equal(padded[:, :longest], plain.pad(plain.tokens_ME))
    assert not padded[:, longest:].any()


def test_starts_are_where_captions_begin_and_end():
    text = PackedText.pack(make((3, 1, 5)))
    assert text.starts.tolist() == [0, 3, 4, 9]
    assert text.starts.dtype == torch.int32


def test_pads_values_of_another_width():
    text = PackedText.pack(make())
    values = torch.arange(11.0)[:, None].repeat(1, 7) + 1
    rectangle = text.pad(values)
    assert rectangle.shape == (4, 5, 7)
    assert rectangle[:, :, 0].tolist() == [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [5, 6, 7, 8, 9], [10, 11, 0, 0, 0]]


@pytest.mark.parametrize("lengths", [LENGTHS, (2, 2)])
def test_gradients_pass_through_pad(lengths):
    text = PackedText.pack(make(lengths))
    values = torch.randn(sum(lengths), 4, requires_grad=True)
    weights = torch.randn(len(lengths), max(lengths), 4)
    (text.pad(values) * weights).sum().backward()
    assert torch.equal(values.grad, weights.flatten(0, 1)[text.slot_M])


def test_gradients_reach_the_captions():
    captions = [c.requires_grad_() for c in make()]
    PackedText.pack(captions).pad(PackedText.pack(captions).tokens_ME).square().sum().backward()
    for caption in captions:
        assert torch.allclose(caption.grad, 2 * caption)


def test_adds_and_repeats():
    first, second = make((3, 1)), make((2, 4, 3), seed=1)
    assert same(PackedText.pack(first) + PackedText.pack(second), first + second)
    assert same(PackedText.pack(make((2, 2))) + PackedText.pack(make((3,))), make((2, 2)) + make((3,)))
    assert same(PackedText.pack(first) * 3, first * 3)
    assert same(PackedText.pack(first) * 1, first)


def test_runs_are_of_neighbours_of_one_length():
    assert PackedText.pack(make((3, 3, 1, 3, 2, 2, 2))).runs() == [(2, 3), (1, 1), (1, 3), (3, 2)]
    assert PackedText.pack(make((4, 4))).runs() == [(2, 4)]
    assert PackedText.pack(make((6,))).runs() == [(1, 6)]


def test_to_changes_the_embeddings_only():
    text = PackedText.pack(make())
    cast = text.to("cpu", torch.bfloat16)
    assert cast.tokens_ME.dtype == torch.bfloat16
    assert cast.keep_BL.dtype == torch.bool
    assert cast.slot_M.dtype == torch.int64
    assert cast.lengths == text.lengths
    assert text.tokens_ME.dtype == torch.float32
    assert same(text.to("cpu"), make())

    moved = text.to("meta")
    assert {t.device.type for t in (moved.tokens_ME, moved.slot_M, moved.keep_BL)} == {"meta"}
    assert moved.lengths == text.lengths
    assert PackedText.pack(make((3, 3))).to("meta").keep_BL is None


def test_packs_where_the_captions_are():
    text = PackedText.pack([c.to("meta") for c in make()])
    assert {t.device.type for t in (text.tokens_ME, text.slot_M, text.keep_BL)} == {"meta"}


def test_with_tokens_keeps_the_layout():
    text = PackedText.pack(make())
    other = text.with_tokens(2 * text.tokens_ME)
    assert same(other, [2 * c for c in make()])


@pytest.mark.parametrize("lengths", [(), (3, 0, 2)])
def test_refuses_captions_without_tokens(lengths):
    with pytest.raises(ValueError, match="no tokens"):
        PackedText.pack(make(lengths))
