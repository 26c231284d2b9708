"""Classifier-free guidance around a backbone that is written out, and its interval."""

import pytest
import torch
from backbones import predict

from pretrain.diffusion import Guidance, Guided
from pretrain.models import CachedConditioning, DiT, DiTConfig, PackedText, TextCache

TEXT = PackedText.pack([torch.full((2, 1), 3.0), torch.full((4, 1), 5.0)])
NULL = PackedText.pack([torch.full((1, 1), -1.0)])


class Recorder:
    """A backbone whose prediction is latent + timestep + the caption's mean; keeps what it was given."""

    def __init__(self):
        self.calls: list[tuple[torch.Tensor, torch.Tensor, PackedText]] = []

    def __call__(self, latent: torch.Tensor, timestep: torch.Tensor, text: PackedText) -> torch.Tensor:
        self.calls.append((latent, timestep, text))
        caption = torch.stack([c.mean() for c in text.captions()])
        return latent + (timestep + caption)[:, None, None, None]


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 5.5])
def test_predicts_null_plus_scale_times_the_difference(scale):
    backbone, latent = Recorder(), torch.randn(2, 3, 4, 4)
    got = Guided(backbone, TEXT, NULL, Guidance(scale))(latent, torch.tensor(250.0), 0.25)
    with_text = latent + 250 + torch.tensor([3.0, 5.0])[:, None, None, None]
    without = latent + 250 - 1
    torch.testing.assert_close(got, without + scale * (with_text - without))

    ((given, timestep, text),) = backbone.calls
    assert torch.equal(given, torch.cat([latent, latent]))
    assert timestep.tolist() == [250.0] * 4
    assert text.lengths == (2, 4, 1, 1)


def test_a_negative_for_each_prompt():
    backbone, latent = Recorder(), torch.randn(2, 3, 4, 4)
    negatives = PackedText.pack([torch.full((3, 1), -7.0), torch.full((1, 1), 2.0)])
    got = Guided(backbone, TEXT, negatives, Guidance(3.0))(latent, torch.tensor(250.0), 0.25)
    caption = torch.tensor([-7 + 3 * (3 + 7.0), 2 + 3 * (5 - 2.0)])
    torch.testing.assert_close(got, latent + 250 + caption[:, None, None, None])
    assert backbone.calls[0][2].lengths == (2, 4, 3, 1)


def test_scale_1_is_the_backbone_itself_at_half_the_cost():
    backbone, latent = Recorder(), torch.randn(2, 3, 4, 4)
    got = Guided(backbone, TEXT, NULL, Guidance(1))(latent, torch.tensor(250.0), 0.25)
    ((given, timestep, text),) = backbone.calls
    assert torch.equal(given, latent)
    assert timestep.shape == (2,)
    assert text.lengths == TEXT.lengths
    assert torch.equal(got, backbone(latent, timestep, TEXT))


@pytest.mark.parametrize(
    ("interval", "t", "inside"),
    [
        ((0.2, 0.7), 0.45, True),
        ((0.2, 0.7), 0.2, True),
        ((0.2, 0.7), 0.7, True),
        ((0.2, 0.7), 0.199, False),
        ((0.2, 0.7), 0.701, False),
        ((0.5, 0.5), 0.5, True),
        ((0.0, 1.0), 0.0, True),
        ((0.0, 1.0), 1.0, True),
        ((0.0, 2 / 3), 0.66666669, True),  # a timestep is in fp32
    ],
)
def test_outside_the_interval_the_text_half_alone_is_evaluated(interval, t, inside):
    """There it is the unguided prediction at half the cost; inside, borders included, the guided one."""
    backbone, latent, timestep = Recorder(), torch.randn(2, 3, 4, 4), torch.tensor(1000 * t)
    got = Guided(backbone, TEXT, NULL, Guidance(3.0, interval))(latent, timestep, t)
    ((given, timesteps, text),) = backbone.calls
    assert len(given) == len(timesteps) == len(text) == (4 if inside else 2)
    assert torch.equal(got, Guided(backbone, TEXT, NULL, Guidance(3.0 if inside else 1.0))(latent, timestep, t))


def test_an_interval_changes_nothing_at_scale_1():
    assert not any(Guidance(1.0, (0.2, 0.7)).at(t) for t in (0.0, 0.2, 0.5, 0.7, 1.0))


@pytest.mark.parametrize("interval", [(0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_refuses_an_interval_that_is_none(interval):
    with pytest.raises(ValueError, match=r"guidance interval .* two times in 0\.\.1"):
        Guidance(3.0, interval)


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_around_a_real_backbone(cached):
    """One batch of both halves equals two passes; with captions as they are, or as the backbone encoded them."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(width=16, heads=2, depth=2, patch=2, latent_channels=3, text_width=1, mask="adaln_single"))
    model.double().eval()
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    latent, timestep = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor(400.0)
    text, null = TEXT.to("cpu", torch.float64), NULL.to("cpu", torch.float64)

    def plain(latent: torch.Tensor, timestep: torch.Tensor, text: PackedText) -> torch.Tensor:
        return predict(model, latent, timestep, text).sample_BCHW

    def from_caches(latent: torch.Tensor, timestep: torch.Tensor, text: TextCache) -> torch.Tensor:
        (time,) = model.embed_times(timestep[:1])
        return model(latent, CachedConditioning(time, text)).sample_BCHW

    with_text, without = (plain(latent, timestep.expand(2), half) for half in (text, null * 2))
    assert (with_text - without).abs().max() > 1e-3
    if cached:
        guided = Guided(from_caches, model.encode_text(text), model.encode_text(null), Guidance(4.0))
    else:
        guided = Guided(plain, text, null, Guidance(4.0))
    got = guided(latent, timestep, 0.4)
    torch.testing.assert_close(got, without + 4.0 * (with_text - without))
