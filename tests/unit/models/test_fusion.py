"""SPRINT's fusion: its start, what learns, and what it costs; tests of token routing (test_routing.py) hold its sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backbones import build, predict, predict_cached
from torch import Tensor

from pretrain.diffusion import kept_tokens
from pretrain.models import DiT, DiTConfig, PackedText, preset
from pretrain.models.cost import count_flops, count_parameters
from pretrain.models.routing import Route, Routing

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = DiTConfig(
    width=24, heads=2, depth=5, patch=2, latent_channels=3, text_width=10, mask="release", ffn="shared", mask_hidden=(16, 8)
)  # fmt: skip
FUSED = replace(PLAIN, fusion=(1, 4))
SPRINT = Routing("sprint", 0.6, 1, 4, 1.0)


def inputs() -> tuple[Tensor, Tensor, PackedText]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 3, 6, 10, dtype=torch.float64, generator=generator)
    texts = [torch.randn(n, 10, dtype=torch.float64, generator=generator) for n in (5, 3)]
    return latent, torch.tensor([400.0, 400.0]), PackedText.pack(texts)


def route() -> Route:
    return SPRINT.route(kept_tokens([7, 8], 15, SPRINT.kept(15), torch.device("cpu")))


def pair() -> tuple[DiT, DiT]:
    """A plain model off its start, and one with a fresh fusion and the same other parameters."""
    plain, fused = build(PLAIN).double(), DiT(FUSED).double()
    rest = fused.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in rest.missing_keys} == {"fusion"} and not rest.unexpected_keys
    return plain, fused


@torch.no_grad()
def test_a_fresh_fusion_is_the_plain_model_and_with_routing_tread() -> None:
    plain, fused = pair()
    torch.testing.assert_close(predict(fused, *inputs()).sample_BCHW, predict(plain, *inputs()).sample_BCHW)
    some, tread = (predict(model, *inputs(), route=route()) for model in (fused, plain))
    torch.testing.assert_close(some.sample_BCHW, tread.sample_BCHW)
    assert len(some.masks) == 5
    for (one, _), (other, _) in zip(some.masks, tread.masks, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_sampling_computes_it_as_training_does() -> None:
    model = build(FUSED).double()
    latent, timestep, text = inputs()
    trained = predict(model, latent, timestep, text)
    assert not torch.allclose(trained.sample_BCHW, predict(pair()[0], latent, timestep, text).sample_BCHW)
    drawn = predict_cached(model, latent, timestep[:1], text)
    torch.testing.assert_close(drawn.sample_BCHW, trained.sample_BCHW)


def test_all_of_it_learns_from_the_start_and_left_out_tokens_teach_the_vector_alone_that_stands_for_them() -> None:
    _, model = pair()
    predict(model, *inputs()).sample_BCHW.square().mean().backward()
    fusion = {name: p.grad for name, p in model.fusion.named_parameters()}
    assert fusion.pop("left_out") is None, "no token was left out"
    assert all(g.abs().max() > 0 for g in fusion.values())
    predict(model, *inputs(), route=route()).sample_BCHW.square().mean().backward()
    assert model.fusion.left_out.grad.abs().max() > 0


def test_its_cost() -> None:
    """Two maps of D², a bias and a vector; their products are 0.5% of a step's at 1B."""
    D = PLAIN.width
    assert count_parameters(FUSED).total - count_parameters(PLAIN).total == 2 * D * D + 2 * D
    whole = preset("focusdit_1b_shared2d")
    fused = replace(whole, fusion=(2, 26))
    more = count_flops(fused, (16, 16), 120).total / count_flops(whole, (16, 16), 120).total
    assert more == pytest.approx(1.0045, abs=1e-4)
