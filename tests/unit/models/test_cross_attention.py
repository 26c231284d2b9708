"""Cross-attention against attention written out, captions by themselves, and padding."""

import math
from itertools import pairwise

import pytest
import torch

from pretrain.models import PackedText, cross_attention
from pretrain.models.cross_attention import CrossAttention

WIDTH, HEADS = 24, 2


def seeded(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.double()


def captions(*lengths: int) -> list[torch.Tensor]:
    return [torch.randn(n, WIDTH, dtype=torch.float64) for n in lengths]


def attend(q_ND: torch.Tensor, k_LD: torch.Tensor, v_LD: torch.Tensor) -> torch.Tensor:
    """Softmax attention of one image, head by head."""
    heads = zip(*(t.chunk(HEADS, dim=-1) for t in (q_ND, k_LD, v_LD)), strict=True)
    return torch.cat([attend_head(q, k, v) for q, k, v in heads], dim=-1)


def attend_head(q_Nd: torch.Tensor, k_Ld: torch.Tensor, v_Ld: torch.Tensor) -> torch.Tensor:
    return (q_Nd @ k_Ld.T / math.sqrt(q_Nd.shape[-1])).softmax(-1) @ v_Ld


def varlen_attn(q_ThD, k_MhD, v_MhD, starts_q, starts_k, longest_q, longest_k):
    """What torch's kernel of this name computes, which there is on GPUs alone."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert starts_q.diff().max() <= longest_q and starts_k.diff().max() <= longest_k
    parts = []
    for (a, b), (c, d) in zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True):
        parts.append(
            torch.cat([attend_head(q_ThD[a:b, h], k_MhD[c:d, h], v_MhD[c:d, h])[:, None] for h in range(HEADS)], 1)
        )
    return torch.cat(parts)


@pytest.mark.parametrize("lengths", [(5, 1, 3), (4, 4, 4), (2, 2, 5)])
@pytest.mark.parametrize("form", ["padded", "by_length", "unpadded"])
def test_cross_attention_of_packed_captions_equals_one_at_a_time(lengths, form, monkeypatch):
    monkeypatch.setattr(cross_attention, "varlen_attn", varlen_attn)
    attention = seeded(CrossAttention(WIDTH, HEADS))
    texts, x = captions(*lengths), torch.randn(3, 6, WIDTH, dtype=torch.float64)
    packed = PackedText.pack(texts)
    got = attention(x, getattr(attention, form)(packed))
    for image, text, result in zip(x, texts, got, strict=True):
        alone = attention(image[None], attention.padded(PackedText.pack([text])))[0]
        torch.testing.assert_close(result, alone)
        keys, values = attention.kv(text).chunk(2, dim=-1)
        torch.testing.assert_close(result, attention.out(attend(attention.q(image), keys, values)))


def test_by_length_there_is_no_padding():
    """Keys and values [b, h, L, d] of each run: as many as there are tokens."""
    segments = seeded(CrossAttention(WIDTH, HEADS)).by_length(PackedText.pack(captions(5, 2, 2, 3)))
    expected = [(b, HEADS, length, WIDTH // HEADS) for b, length in ((1, 5), (2, 2), (1, 3))]
    assert [tuple(s.keys.shape) for s in segments] == [tuple(s.values.shape) for s in segments] == expected
    assert all(s.keep is None for s in segments)


def test_padding_is_never_attended_to():
    """Whatever stands in the rectangle's empty places, the result and the gradients are the same."""

    class Dirty(PackedText):
        def pad(self, values_MX: torch.Tensor) -> torch.Tensor:
            clean = super().pad(values_MX)
            return torch.where(self.keep_BL[..., None], clean, 1e3 * torch.randn_like(clean))

    attention, x = seeded(CrossAttention(WIDTH, HEADS)), torch.randn(3, 6, WIDTH, dtype=torch.float64)
    text = PackedText.pack(captions(5, 1, 3))
    dirty = Dirty(text.tokens_ME, text.lengths, text.slot_M, text.starts, text.keep_BL)
    assert not torch.equal(dirty.pad(text.tokens_ME), text.pad(text.tokens_ME))
    gradients = []
    for captioned in (text, dirty):
        attention.zero_grad()
        result = attention(x, attention.padded(captioned))
        result.square().sum().backward()
        gradients.append([result.detach(), *(p.grad for p in attention.parameters())])
    for clean, soiled in zip(*gradients, strict=True):
        torch.testing.assert_close(clean, soiled, rtol=0, atol=1e-12)


def test_text_reaches_only_its_own_image():
    attention, x = seeded(CrossAttention(WIDTH, HEADS)), torch.randn(3, 6, WIDTH, dtype=torch.float64)
    texts = captions(5, 1, 3)
    before = attention(x, attention.padded(PackedText.pack(texts)))
    after = attention(x, attention.padded(PackedText.pack([texts[0], texts[1] + 1, texts[2]])))
    changed = [not torch.allclose(b, a) for b, a in zip(before, after, strict=True)]
    assert changed == [False, True, False]
