"""Self- and cross-attention against attention written out, padding, and shifted positions."""

import math

import pytest
import torch

from pretrain.models import PackedText
from pretrain.models.embeddings import Rotary, rotary_positions
from pretrain.models.mixers.full import CrossAttention, SelfAttention

WIDTH, HEADS = 24, 2
CPU = torch.device("cpu")


def seeded(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.double()


def captions(*lengths: int) -> list[torch.Tensor]:
    return [torch.randn(n, WIDTH, dtype=torch.float64) for n in lengths]


def attend(q_ND: torch.Tensor, k_LD: torch.Tensor, v_LD: torch.Tensor) -> torch.Tensor:
    """Softmax attention of one image, head by head."""
    heads = []
    for q, k, v in zip(*(t.chunk(HEADS, dim=-1) for t in (q_ND, k_LD, v_LD)), strict=True):
        heads.append((q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    return torch.cat(heads, dim=-1)


def test_self_attention_is_softmax_attention():
    attention, x = seeded(SelfAttention(WIDTH, HEADS)), torch.randn(3, 6, WIDTH, dtype=torch.float64)
    still = Rotary(x.new_ones(6, WIDTH // HEADS), x.new_zeros(6, WIDTH // HEADS), 2)
    expected = torch.stack([attention.out(attend(*attention.qkv(image).chunk(3, dim=-1))) for image in x])
    torch.testing.assert_close(attention(x, still), expected)


@pytest.mark.parametrize("lengths", [(5, 1, 3), (4, 4, 4), (2, 2, 5)])
@pytest.mark.parametrize("read", [False, True])
def test_cross_attention_of_packed_captions_equals_one_at_a_time(lengths, read):
    attention = seeded(CrossAttention(WIDTH, HEADS))
    texts, x = captions(*lengths), torch.randn(3, 6, WIDTH, dtype=torch.float64)
    packed = PackedText.pack(texts)
    got = attention(x, attention.read(packed) if read else packed)
    for image, text, result in zip(x, texts, got, strict=True):
        alone = attention(image[None], PackedText.pack([text]))[0]
        torch.testing.assert_close(result, alone)
        keys, values = attention.kv(text).chunk(2, dim=-1)
        torch.testing.assert_close(result, attention.out(attend(attention.q(image), keys, values)))


def test_what_is_read_has_no_padding():
    """Keys and values [b, h, L, d] of each run: as many as there are tokens."""
    runs = seeded(CrossAttention(WIDTH, HEADS)).read(PackedText.pack(captions(5, 2, 2, 3)))
    expected = [(b, HEADS, length, WIDTH // HEADS) for b, length in ((1, 5), (2, 2), (1, 3))]
    assert [tuple(keys.shape) for keys, _ in runs] == [tuple(values.shape) for _, values in runs] == expected


def test_padding_is_never_attended_to():
    """Whatever stands in the rectangle's empty places, the result and the gradients are the same."""

    class Dirty(PackedText):
        def pad(self, values_MX: torch.Tensor) -> torch.Tensor:
            clean = super().pad(values_MX)
            return torch.where(self.keep_BL[..., None], clean, 1e3 * torch.randn_like(clean))

    attention, x = seeded(CrossAttention(WIDTH, HEADS)), torch.randn(3, 6, WIDTH, dtype=torch.float64)
    text = PackedText.pack(captions(5, 1, 3))
    dirty = Dirty(text.tokens_ME, text.lengths, text.slot_M, text.keep_BL)
    assert not torch.equal(dirty.pad(text.tokens_ME), text.pad(text.tokens_ME))
    gradients = []
    for captioned in (text, dirty):
        attention.zero_grad()
        result = attention(x, captioned)
        result.square().sum().backward()
        gradients.append([result.detach(), *(p.grad for p in attention.parameters())])
    for clean, soiled in zip(*gradients, strict=True):
        torch.testing.assert_close(clean, soiled, rtol=0, atol=1e-12)


def test_text_reaches_only_its_own_image():
    attention, x = seeded(CrossAttention(WIDTH, HEADS)), torch.randn(3, 6, WIDTH, dtype=torch.float64)
    texts = captions(5, 1, 3)
    before = attention(x, PackedText.pack(texts))
    after = attention(x, PackedText.pack([texts[0], texts[1] + 1, texts[2]]))
    changed = [not torch.allclose(b, a) for b, a in zip(before, after, strict=True)]
    assert changed == [False, True, False]


@pytest.mark.parametrize("layout", ["halves", "thirds"])
def test_self_attention_sees_relative_positions_only(layout):
    """The same tokens at positions shifted by whole rows and columns attend alike; at other distances they do not."""
    attention, x = seeded(SelfAttention(WIDTH, HEADS)), torch.randn(2, 4 * 3, WIDTH, dtype=torch.float64)

    def window(rows: slice, columns: slice) -> Rotary:
        whole = rotary_positions(layout, (11, 9), WIDTH // HEADS, 1.0, CPU, torch.float64)
        cos, sin = (t.unflatten(0, (11, 9))[rows, columns].flatten(0, 1) for t in (whole.cos_Nd, whole.sin_Nd))
        return Rotary(cos, sin, whole.parts)

    at_origin = attention(x, window(slice(0, 4), slice(0, 3)))
    shifted = attention(x, window(slice(7, 11), slice(5, 8)))
    spread = attention(x, window(slice(0, 8, 2), slice(0, 3)))
    torch.testing.assert_close(at_origin, shifted, rtol=0, atol=1e-5)  # angles are made in fp32
    assert (at_origin - spread).abs().max() > 1e-2
    own = rotary_positions(layout, (4, 3), WIDTH // HEADS, 1.0, CPU, torch.float64)
    torch.testing.assert_close(at_origin, attention(x, own), rtol=0, atol=0)
