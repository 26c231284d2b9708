"""Classifier-free guidance around a backbone that is written out."""

import pytest
import torch

from pretrain.diffusion import Guided
from pretrain.models import DiT, DiTConfig, PackedText

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
    got = Guided(backbone, TEXT, NULL, scale)(latent, torch.tensor(250.0))
    with_text = latent + 250 + torch.tensor([3.0, 5.0])[:, None, None, None]
    without = latent + 250 - 1
    torch.testing.assert_close(got, without + scale * (with_text - without))

    ((given, timestep, text),) = backbone.calls
    assert torch.equal(given, torch.cat([latent, latent]))
    assert timestep.tolist() == [250.0] * 4
    assert text.lengths == (2, 4, 1, 1)


def test_scale_1_is_the_backbone_itself_at_half_the_cost():
    backbone, latent = Recorder(), torch.randn(2, 3, 4, 4)
    got = Guided(backbone, TEXT, NULL, 1)(latent, torch.tensor(250.0))
    ((given, timestep, text),) = backbone.calls
    assert torch.equal(given, latent)
    assert timestep.shape == (2,)
    assert text.lengths == TEXT.lengths
    assert torch.equal(got, backbone(latent, timestep, TEXT))


@torch.no_grad()
def test_around_a_real_backbone():
    """One batch of both halves equals two passes."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(width=16, heads=2, depth=2, patch=2, latent_channels=3, text_width=1, mask="adaln_single"))
    model.double().eval()
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    latent, timestep = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor(400.0)
    text, null = TEXT.to("cpu", torch.float64), NULL.to("cpu", torch.float64)

    def backbone(latent: torch.Tensor, timestep: torch.Tensor, text: PackedText) -> torch.Tensor:
        return model(latent, timestep, text).sample_BCHW

    with_text, without = (backbone(latent, timestep.expand(2), half) for half in (text, null * 2))
    assert (with_text - without).abs().max() > 1e-3
    got = Guided(backbone, text, null, 4.0)(latent, timestep)
    torch.testing.assert_close(got, without + 4.0 * (with_text - without))
