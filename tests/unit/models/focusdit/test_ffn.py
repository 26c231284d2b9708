"""The three vocabulary layouts."""

import math
from itertools import pairwise

import pytest
import torch

from pretrain.models import DiT, DiTConfig
from pretrain.models.focusdit.ffn import LAYOUTS, Vocabulary, local_size

CONFIG = DiTConfig(width=16, heads=2, depth=3, patch=2, latent_channels=3, text_width=5)


def dense(x: torch.Tensor, keys: list, values: list, bias: torch.Tensor) -> torch.Tensor:
    """One FFN over concatenated entries: gelu(x K + b) V + b_V, with GELU's tanh form written out."""
    h = x @ torch.cat([k.weight for k in keys]).T + torch.cat([k.bias for k in keys])
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return h @ torch.cat([v.weight for v in values], dim=1).T + bias


def test_a_vocabulary_is_a_dense_ffn():
    torch.manual_seed(0)
    ffn, x = Vocabulary(16, 40), torch.randn(2, 5, 16)
    torch.testing.assert_close(ffn(x), dense(x, [ffn.key], [ffn.value], ffn.value.bias))


@pytest.mark.parametrize("shared_width", [1, 2, 3])
def test_shared_layout_is_one_dense_ffn_of_4D(shared_width):
    """Eq. 5: f(loc) + f(sha) + own bias = a dense FFN over both experts' entries."""
    torch.manual_seed(0)
    config = DiTConfig(**{**vars(CONFIG), "ffn": "shared", "shared_width": shared_width})
    model, x = DiT(config), torch.randn(2, 5, 16)
    shared = model.shared_expert
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert shared.key.out_features == shared_width * 16
    for block in model.blocks:
        local = block.ffn
        assert local.key.out_features + shared.key.out_features == 4 * 16
        expected = dense(x, [local.key, shared.key], [local.value, shared.value], local.value.bias)
        torch.testing.assert_close(local(x) + shared(x), expected)


def test_the_shared_expert_is_one_module_with_a_key_bias_and_no_output_bias():
    names = [n for n, _ in DiT(DiTConfig(**{**vars(CONFIG), "ffn": "shared"})).named_parameters()]
    assert [n for n in names if n.startswith("shared_expert")] == [
        "shared_expert.key.weight",
        "shared_expert.key.bias",
        "shared_expert.value.weight",
    ]
    assert sum(n.endswith("ffn.value.bias") for n in names) == CONFIG.depth


@pytest.mark.parametrize("layout", ["uniform", "tapered"])
def test_other_layouts_share_nothing(layout):
    assert DiT(DiTConfig(**{**vars(CONFIG), "ffn": layout})).shared_expert is None


def test_tapered_sizes_of_the_release():
    """D = 1536, L = 28: from 4608 at both ends to 7676 in the middle, 4.0D on average."""
    sizes = [local_size("tapered", 1536, 2, block, 28) for block in range(28)]
    assert sizes[0] == sizes[-1] == 4608
    assert sizes[13] == sizes[14] == max(sizes) == 7676
    assert sizes == sizes[::-1]
    assert {b - a for a, b in pairwise(sizes[:14])} == {236}
    assert sum(sizes) / 28 / 1536 == pytest.approx(4.0, abs=0.005)


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 7])
def test_tapered_sizes_of_few_blocks(depth):
    sizes = [local_size("tapered", 12, 2, block, depth) for block in range(depth)]
    assert sizes == sizes[::-1]
    assert min(sizes) == sizes[0] == 36
    assert max(sizes) <= 60


def test_uniform_and_shared_sizes():
    assert {local_size("uniform", 1536, 2, block, 28) for block in range(28)} == {6144}
    assert [local_size("shared", 1536, s, 5, 28) for s in (1, 2, 3)] == [4608, 3072, 1536]


def test_refuses_an_unknown_layout():
    with pytest.raises(ValueError, match=", ".join(LAYOUTS)):
        local_size("wide", 8, 2, 0, 3)
