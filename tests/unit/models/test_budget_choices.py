"""The compute budgets of a backbone: the default at a noise level, a chosen one, and refused ones."""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from backbones import predict, predict_cached
from torch import Tensor

from pretrain.models import CachedConditioning, ComputeBudget, DiT, DiTConfig, PackedText
from pretrain.models.budget_choices import common_budget, default_budget
from pretrain.models.mixers.flexdit import FlexDiTSection
from pretrain.models.mixers.mediators import MediatorsSection

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE = DiTConfig(
    width=24,
    heads=2,
    depth=8,
    patch=2,
    latent_channels=3,
    text_width=10,
    mediators=MediatorsSection((1, 4, 16)),
    mask_hidden=(8,),
)
MEDIATED = replace(DENSE, attention="mediators", depth=2)
FLEX = replace(DENSE, density="flexdit", flexdit=FlexDiTSection(sparsity=(0.3, 0.8)))
BOTH = replace(FLEX, attention="mediators")


@cache
def build(config: DiTConfig) -> DiT:
    """A model in fp64 with random parameters, as after some training: nothing is 0."""
    torch.manual_seed(0)
    model = DiT(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(images: int = 2) -> tuple[Tensor, PackedText]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(images, 3, 10, 14, dtype=torch.float64, generator=generator)
    texts = [torch.randn(n, 10, dtype=torch.float64, generator=generator) for n in (5, 1, 3)[:images]]
    return latent, PackedText.pack(texts)


def test_few_mediators_near_noise_and_many_near_data():
    levels = [0.0, 0.32, 0.34, 0.66, 0.67, 0.99, 1.0]
    assert [default_budget(MEDIATED, t).get("mediators") for t in levels] == [16, 16, 4, 4, 1, 1, 1]
    assert {
        default_budget(replace(MEDIATED, mediators=MediatorsSection((4,))), t).get("mediators") for t in levels
    } == {4}


def test_bins_of_the_noise_level():
    assert [default_budget(FLEX, t) for t in (0.0, 0.3, 0.5, 0.8, 1.0)] == [
        ComputeBudget.of(flexdit=b) for b in (0, 1, 2, 3, 3)
    ]


def test_both_follow_at_once_and_a_plain_model_has_no_choice():
    assert default_budget(BOTH, 0.9) == ComputeBudget.of(mediators=1, flexdit=3)
    assert default_budget(BOTH, 0.9, {"mediators": 16}) == ComputeBudget.of(mediators=16, flexdit=3)
    assert default_budget(DENSE, 0.9) == ComputeBudget()
    names = [[m.name for m in c.open_methods] for c in (DENSE, MEDIATED, FLEX, BOTH)]
    assert names == [[], ["mediators"], ["flexdit"], ["mediators", "flexdit"]]


def test_one_budget_for_all_images_or_none():
    assert common_budget(BOTH, [0.01, 0.2]) == ComputeBudget.of(mediators=16, flexdit=0)
    assert common_budget(DENSE, [0.0, 1.0]) == ComputeBudget()
    for config, levels in ((MEDIATED, [0.0, 0.4]), (FLEX, [0.2, 0.3]), (BOTH, [0.26, 0.4])):
        with pytest.raises(ValueError, match="ask for different ones; pass them one by one, or give the budget"):
            common_budget(config, levels)


@pytest.mark.parametrize(
    ("config", "budget", "line"),
    [
        (MEDIATED, ComputeBudget.of(mediators=9), "mediators: 9 is none of 1, 4, 16, which this model can do"),
        (MEDIATED, ComputeBudget(), "mediators: None is none of 1, 4, 16, which this model can do"),
        (
            MEDIATED,
            ComputeBudget.of(mediators=4, flexdit=1),
            "flexdit: 1, but this model (mediators attention, density dense) has no such choice; leave it out",
        ),
        (
            DENSE,
            ComputeBudget.of(mediators=4),
            "mediators: 4, but this model (full attention, density dense) has no such choice; leave it out",
        ),
        (
            DENSE,
            ComputeBudget.of(flexdit=0),
            "flexdit: 0, but this model (full attention, density dense) has no such choice; leave it out",
        ),
        (FLEX, ComputeBudget(), "flexdit: None is none of 0, 1, 2, 3, which this model can do"),
        (FLEX, ComputeBudget.of(flexdit=4), "flexdit: 4 is none of 0, 1, 2, 3, which this model can do"),
        (FLEX, ComputeBudget.of(flexdit=-1), "flexdit: -1 is none of 0, 1, 2, 3, which this model can do"),
        (
            FLEX,
            ComputeBudget.of(mediators=16, flexdit=0),
            "mediators: 16, but this model (full attention, density flexdit) has no such choice; leave it out",
        ),
        (BOTH, ComputeBudget.of(flexdit=0), "mediators: None is none of 1, 4, 16, which this model can do"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_forward_pass_refuses_a_budget_that_the_model_does_not_have(config, budget, line, cached):
    latent, text = inputs()
    forward = predict_cached if cached else predict
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        forward(build(config), latent, torch.full((2,), 100.0), text, budget=budget)


def test_asking_for_mediators_that_there_are_not_is_refused():
    with pytest.raises(ValueError, match=r"^mediators: 9 is none of 1, 4, 16"):
        default_budget(MEDIATED, 0.5, {"mediators": 9})
    with pytest.raises(ValueError, match=r"^mediators: 4, but this model \(full attention"):
        default_budget(FLEX, 0.5, {"mediators": 4})


@torch.no_grad()
@pytest.mark.parametrize("config", [MEDIATED, FLEX, BOTH])
def test_the_default_is_the_budget_of_the_noise_level(config):
    model, (latent, text) = build(config), inputs()
    results = []
    for level in (0.1, 0.4, 0.9):
        timestep = torch.full((2,), 1000 * level)
        budget = default_budget(config, level)
        default = predict(model, latent, timestep, text).sample_BCHW
        assert torch.equal(default, predict(model, latent, timestep, text, budget=budget).sample_BCHW)
        other = predict(model, latent, timestep, text, budget=default_budget(config, 1 - level + 0.15)).sample_BCHW
        results.append(torch.equal(default, other))
    assert not any(results)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["none", "release", "adaln_single"])
@pytest.mark.parametrize("config", [MEDIATED, FLEX, BOTH])
def test_cached_times_know_their_noise_level(config, mask):
    model, (latent, text) = build(replace(config, mask=mask)), inputs()
    timesteps = torch.tensor([1000.0, 749.9, 412.7, 250.0, 0.0])
    for timestep, time in zip(timesteps, model.embed_times(timesteps), strict=True):
        expected = predict(model, latent, timestep.expand(2), text)
        got = model(latent, CachedConditioning(time, model.encode_text(text)))
        torch.testing.assert_close(got.sample_BCHW, expected.sample_BCHW)
        if mask != "none":
            torch.testing.assert_close(got.masks_KBN, expected.masks_KBN)


@torch.no_grad()
@pytest.mark.parametrize("config", [MEDIATED, FLEX, BOTH])
def test_images_of_different_noise_levels_need_a_budget(config):
    """With one each image is computed as it is alone."""
    model, (latent, text) = build(config), inputs()
    timestep = torch.tensor([100.0, 900.0])
    with pytest.raises(ValueError, match="pass them one by one, or give the budget"):
        predict(model, latent, timestep, text)
    budget = default_budget(config, 0.4)
    together = predict(model, latent, timestep, text, budget=budget).sample_BCHW
    for b in range(2):
        caption = PackedText.pack([text.captions()[b]])
        alone = predict(model, latent[b : b + 1], timestep[b : b + 1], caption, budget=budget).sample_BCHW
        torch.testing.assert_close(alone, together[b : b + 1])
