"""How much a forward pass computes: the default at a noise level, what is asked for, and what is refused."""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from pretrain.models import DiT, DiTConfig, Effort, PackedText
from pretrain.models.budgets import depends_on_time

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE = DiTConfig(
    width=24, heads=2, depth=8, patch=2, latent_channels=3, text_width=10, mediators=(1, 4, 16), mask_hidden=(8,)
)
MEDIATED = replace(DENSE, attention="mediators", depth=2)
FLEX = replace(DENSE, density="flexdit", sparsity=(0.3, 0.8))
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
    assert [Effort.at(MEDIATED, t).mediators for t in levels] == [16, 16, 4, 4, 1, 1, 1]
    assert {Effort.at(replace(MEDIATED, mediators=(4,)), t).mediators for t in levels} == {4}


def test_bins_of_the_noise_level():
    assert [Effort.at(FLEX, t) for t in (0.0, 0.3, 0.5, 0.8, 1.0)] == [Effort(bin=b) for b in (0, 1, 2, 3, 3)]


def test_both_follow_at_once_and_a_plain_model_has_no_choice():
    assert Effort.at(BOTH, 0.9) == Effort(1, 3)
    assert Effort.at(BOTH, 0.9, mediators=16) == Effort(16, 3)
    assert Effort.at(DENSE, 0.9) == Effort()
    assert [depends_on_time(c) for c in (DENSE, MEDIATED, FLEX, BOTH)] == [False, True, True, True]


def test_one_effort_for_all_images_or_none():
    assert Effort.for_all(BOTH, [0.01, 0.2]) == Effort(16, 0)
    assert Effort.for_all(DENSE, [0.0, 1.0]) == Effort()
    for config, levels in ((MEDIATED, [0.0, 0.4]), (FLEX, [0.2, 0.3]), (BOTH, [0.26, 0.4])):
        with pytest.raises(ValueError, match="in different parts; pass them one by one, or give the effort"):
            Effort.for_all(config, levels)


@pytest.mark.parametrize(
    ("config", "effort", "line"),
    [
        (MEDIATED, Effort(9), "mediators: 9 is none of 1, 4, 16, for which this model has tables"),
        (MEDIATED, Effort(), "mediators: None is none of 1, 4, 16, for which this model has tables"),
        (MEDIATED, Effort(4, 1), "bin: 1, but every block of this model computes on all tokens; leave it out"),
        (DENSE, Effort(4), "mediators: 4, but this model has full attention; leave them out"),
        (DENSE, Effort(bin=0), "bin: 0, but every block of this model computes on all tokens; leave it out"),
        (FLEX, Effort(), "bin: None is none of 0, 1, 2, 3"),
        (FLEX, Effort(bin=4), "bin: 4 is none of 0, 1, 2, 3"),
        (FLEX, Effort(bin=-1), "bin: -1 is none of 0, 1, 2, 3"),
        (FLEX, Effort(16, 0), "mediators: 16, but this model has full attention; leave them out"),
        (BOTH, Effort(bin=0), "mediators: None is none of 1, 4, 16, for which this model has tables"),
    ],
)
@pytest.mark.parametrize("read", [False, True])
def test_a_forward_pass_refuses_an_effort_that_the_model_does_not_have(config, effort, line, read):
    latent, text = inputs()
    timestep = build(config).read_times(torch.tensor([100.0]))[0] if read else torch.full((2,), 100.0)
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        build(config)(latent, timestep, text, effort=effort)


def test_asking_for_mediators_that_there_are_not_is_refused():
    with pytest.raises(ValueError, match=r"^mediators: 9 is none of 1, 4, 16"):
        Effort.at(MEDIATED, 0.5, mediators=9)
    with pytest.raises(ValueError, match=r"^mediators: 4, but this model has full attention"):
        Effort.at(FLEX, 0.5, mediators=4)


@torch.no_grad()
@pytest.mark.parametrize("config", [MEDIATED, FLEX, BOTH])
def test_the_default_is_the_effort_of_the_noise_level(config):
    model, (latent, text) = build(config), inputs()
    results = []
    for level in (0.1, 0.4, 0.9):
        timestep = torch.full((2,), 1000 * level)
        effort = Effort.at(config, level)
        default = model(latent, timestep, text).sample_BCHW
        assert torch.equal(default, model(latent, timestep, text, effort=effort).sample_BCHW)
        other = model(latent, timestep, text, effort=Effort.at(config, 1 - level + 0.15)).sample_BCHW
        results.append(torch.equal(default, other))
    assert not any(results)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["none", "release", "adaln_single"])
@pytest.mark.parametrize("config", [MEDIATED, FLEX, BOTH])
def test_times_read_before_know_their_noise_level(config, mask):
    model, (latent, text) = build(replace(config, mask=mask)), inputs()
    timesteps = torch.tensor([1000.0, 749.9, 412.7, 250.0, 0.0])
    for timestep, memory in zip(timesteps, model.read_times(timesteps), strict=True):
        expected = model(latent, timestep.expand(2), text)
        for got in (model(latent, memory, text), model(latent, memory, model.read(text))):
            torch.testing.assert_close(got.sample_BCHW, expected.sample_BCHW)
            if mask != "none":
                torch.testing.assert_close(got.masks_KBN, expected.masks_KBN)


@torch.no_grad()
@pytest.mark.parametrize("config", [MEDIATED, FLEX, BOTH])
def test_images_of_different_noise_levels_need_an_effort(config):
    """With one each image is computed as it is alone."""
    model, (latent, text) = build(config), inputs()
    timestep = torch.tensor([100.0, 900.0])
    with pytest.raises(ValueError, match="pass them one by one, or give the effort"):
        model(latent, timestep, text)
    effort = Effort.at(config, 0.4)
    together = model(latent, timestep, text, effort=effort).sample_BCHW
    for b in range(2):
        caption = PackedText.pack([text.captions()[b]])
        alone = model(latent[b : b + 1], timestep[b : b + 1], caption, effort=effort).sample_BCHW
        torch.testing.assert_close(alone, together[b : b + 1])
