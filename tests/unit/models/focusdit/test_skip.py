"""Skipping FFNs by the query mask, against the same FFNs computed for all tokens and then masked.

Letters: B images, N tokens, D width, K blocks.
"""

from dataclasses import replace

import pytest
import torch
from backbones import predict, predict_cached
from torch import Tensor, nn

from pretrain.models import DiT, DiTConfig, PackedText, Skip
from pretrain.models.focusdit.ffn import Vocabulary
from pretrain.models.focusdit.mask import QueryMask
from pretrain.models.focusdit.skip import UNITS, apply_to_kept

pytestmark = pytest.mark.usefixtures("one_thread")

FOCUS = DiTConfig(
    width=24, heads=2, depth=3, patch=2, latent_channels=3, text_width=10, mask="release", mask_hidden=(16, 8)
)


def build(config: DiTConfig = FOCUS) -> DiT:
    """A model in fp64 with random parameters, the same at each call: nothing is 0, and the masks differ."""
    torch.manual_seed(0)
    model, generator = DiT(config).double().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return model


def inputs() -> tuple[Tensor, Tensor, PackedText]:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randn(n, 10, dtype=torch.float64, generator=generator) for n in (5, 1, 3)]
    latent = torch.randn(3, 3, 8, 12, dtype=torch.float64, generator=generator)
    return latent, torch.tensor([20.0, 500.0, 950.0]), PackedText.pack(texts)


def kept(mask_BN: Tensor, skip: Skip) -> Tensor:
    """Image by image and token by token."""
    judged = [[m if skip.unit == "token" else float(image.mean()) for m in image] for image in mask_BN]
    return torch.tensor(
        [[m > skip.threshold if skip.unit == "token" else m >= skip.threshold for m in image] for image in judged]
    )


def masked_densely(model: DiT, skip: Skip) -> DiT:
    """The model with all FFNs computed for all tokens, and their outputs multiplied by 0 or 1."""
    last: dict[str, Tensor] = {}
    for module in model.modules():
        if isinstance(module, QueryMask):
            module.register_forward_hook(lambda _, given, mask_BN1: last.update(mask=mask_BN1.squeeze(-1)))
        elif isinstance(module, Vocabulary):
            module.register_forward_hook(lambda _, given, update: update * kept(last["mask"], skip)[..., None])
    return model


def test_the_token_unit_keeps_masks_above_the_threshold():
    mask = torch.tensor([[0.0, 0.2, 0.5, 0.5001], [1.0, 0.49, 0.51, 0.0]])
    assert Skip(0.5).keep(mask).tolist() == [[False, False, False, True], [True, False, True, False]]
    assert Skip(0.0).keep(mask).tolist() == [[False, True, True, True], [True, True, True, False]]
    assert not Skip(1.0, "token").keep(mask).any()


def test_the_layer_unit_keeps_images_whose_mean_reaches_the_threshold():
    """Also for masks of several blocks at once."""
    mask = torch.tensor([[0.25, 0.75, 0.5, 0.5], [0.25, 0.75, 0.5, 0.25], [1.0, 1.0, 1.0, 0.0]])
    assert Skip(0.5, "layer").keep(mask).tolist() == [[True] * 4, [False] * 4, [True] * 4]
    assert Skip(0.5, "layer").keep(torch.stack([mask, 1 - mask]))[1].tolist() == [[True] * 4, [True] * 4, [False] * 4]
    assert Skip(0.0, "layer").keep(mask).all()
    assert Skip(1.0, "layer").keep(torch.ones(1, 4)).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_function_sees_the_kept_tokens_only(share):
    generator, rows = torch.Generator().manual_seed(2), []
    x, keep = torch.randn(3, 7, 4, generator=generator), torch.rand(3, 7, generator=generator) < share
    linear = nn.Linear(4, 4)

    def function(z: Tensor) -> Tensor:
        rows.append(z.flatten(0, -2))
        return linear(z).tanh()

    got = apply_to_kept(function, x, keep)
    torch.testing.assert_close(got, linear(x).tanh() * keep[..., None])
    assert torch.equal(torch.cat(rows) if rows else x[keep], x[keep])


@torch.no_grad()
@pytest.mark.parametrize("ffn", ["uniform", "shared", "tapered"])
@pytest.mark.parametrize("unit", UNITS)
def test_a_threshold_of_0_skips_nothing(unit, ffn):
    model = build(replace(FOCUS, ffn=ffn))
    skipping = predict(model, *inputs(), Skip(0.0, unit)).sample_BCHW
    torch.testing.assert_close(skipping, predict(model, *inputs()).sample_BCHW)


@torch.no_grad()
@pytest.mark.parametrize("ffn", ["uniform", "shared", "tapered"])
def test_a_threshold_of_1_leaves_no_token(ffn):
    model, silent = build(replace(FOCUS, ffn=ffn)), build(replace(FOCUS, ffn=ffn))
    for name, parameter in silent.named_parameters():
        if ".value." in name:
            parameter.zero_()
    got, expected = predict(model, *inputs(), Skip(1.0, "token")), predict(silent, *inputs())
    torch.testing.assert_close(got.sample_BCHW, expected.sample_BCHW)
    torch.testing.assert_close(got.masks_KBN, expected.masks_KBN)
    assert not torch.allclose(got.sample_BCHW, predict(model, *inputs()).sample_BCHW)


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("ffn", "removed"), [("uniform", ()), ("shared", ()), ("shared", (1,))])
@pytest.mark.parametrize(("mask", "unit"), [("release", "token"), ("release", "layer"), ("adaln_single", "token")])
def test_in_between_it_is_the_dense_model_masked(mask, unit, ffn, removed, cached):
    """At a threshold amid what is judged; no FFN sees another token than those kept."""
    config = replace(FOCUS, mask=mask, ffn=ffn, removed_ffns=removed)
    model, (latent, timestep, text) = build(config), inputs()
    if cached:  # one timestep for all images
        timestep = timestep[:1].expand(len(timestep))
    plain = predict(model, latent, timestep, text)
    judged = plain.masks_KBN if unit == "token" else plain.masks_KBN.mean(-1)
    skip = Skip(judged.quantile(0.45).item(), unit)
    expected = predict(masked_densely(build(config), skip), latent, timestep, text)

    rows = [0] * config.depth
    for i, block in enumerate(model.blocks):
        if block.ffn is not None:
            block.ffn.register_forward_pre_hook(
                lambda _, given, i=i: rows.__setitem__(i, given[0].flatten(0, -2).shape[0])
            )
    got = (predict_cached if cached else predict)(model, latent, timestep, text, skip)
    torch.testing.assert_close(got.sample_BCHW, expected.sample_BCHW)
    torch.testing.assert_close(got.masks_KBN, expected.masks_KBN)
    assert not torch.allclose(got.sample_BCHW, plain.sample_BCHW)
    seen = [0 if i in removed else int(kept(m, skip).sum()) for i, m in enumerate(got.masks_KBN)]
    assert rows == seen
    assert 0 < sum(seen) < got.masks_KBN.numel()


@pytest.mark.parametrize(
    ("threshold", "unit"), [(0.5, "block"), (-0.1, "token"), (1.1, "layer"), (float("nan"), "token")]
)
def test_refuses_what_it_cannot_mean(threshold, unit):
    with pytest.raises(ValueError, match="token, layer" if unit == "block" else r"must be in 0\.\.1"):
        Skip(threshold, unit)


def test_refuses_to_skip_without_query_masks():
    with pytest.raises(ValueError, match="no query masks"):
        predict(build(replace(FOCUS, mask="none")), *inputs(), Skip(0.5))
