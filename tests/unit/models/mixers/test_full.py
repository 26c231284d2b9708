"""Full self-attention against attention written out, and shifted positions."""

import math

import pytest
import torch

from pretrain.models.embeddings import Rotary, rotary_positions
from pretrain.models.mixers.full import SelfAttention

WIDTH, HEADS = 24, 2
CPU = torch.device("cpu")


def seeded(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.double()


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
