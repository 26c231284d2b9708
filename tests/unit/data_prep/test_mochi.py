"""Mochi's VAE for pictures against diffusers' own, on small random models; what it leaves out; its precision in bf16."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLMochi
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data_prep.encoders import Vae, fingerprint, lay_out
from data_prep.mochi import FoldedConv, for_pictures

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}  # of the largest value


def small(dtype: torch.dtype = torch.float64, layers: tuple[int, ...] = (2, 1, 2, 1, 3)) -> AutoencoderKLMochi:
    """With attention, and no parameter that has no effect."""
    torch.manual_seed(0)
    widths = (32, 32, 64, 32)
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, layers_per_block=layers
    )
    for parameter in vae.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return vae.to(dtype).eval().requires_grad_(False)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[expected.dtype], error


def moments(vae: AutoencoderKLMochi, pictures: Tensor) -> Tensor:
    return vae.encode(pictures).latent_dist.parameters


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [(48, 32), (45, 67)])
def test_encoding(dtype: torch.dtype, size: tuple[int, int]) -> None:
    plain = small(dtype)
    folded = for_pictures(copy.deepcopy(plain))
    pictures = 2 * torch.rand(3, 3, 1, *size, dtype=dtype) - 1
    assert_close(moments(folded, pictures), moments(plain, pictures))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layers", [(2, 1, 2, 1, 3), (1, 2, 1, 1, 1), (3, 1, 1, 1, 1)])
def test_decoding(dtype: torch.dtype, layers: tuple[int, ...]) -> None:
    """With one, two and three blocks at the end, which see 4, 8 and 12 frames back."""
    plain = small(dtype, layers)
    folded = for_pictures(copy.deepcopy(plain))
    for size in ((2, 4), (5, 3)):
        latents = torch.randn(2, 12, 1, *size, dtype=dtype)
        picture = folded.decode(latents).sample
        assert picture.shape == (2, 3, 1, size[0] * 8, size[1] * 8)
        assert_close(picture, plain.decode(latents).sample)


def test_tiles_and_slices() -> None:
    """diffusers' ways to save memory go on to work."""
    plain = small(layers=(1, 1, 1, 1, 1))
    folded = for_pictures(copy.deepcopy(plain))
    latents = torch.randn(2, 12, 1, 6, 4, dtype=torch.float64)
    for vae in (plain, folded):
        vae.enable_slicing()
        vae.enable_tiling(32, 32, 24, 24)
    assert_close(folded.decode(latents).sample, plain.decode(latents).sample)


def test_all_six_frames_where_diffusers_keeps_them() -> None:
    plain = small()
    plain.drop_last_temporal_frames = False
    latents = torch.randn(1, 12, 1, 4, 3, dtype=torch.float64)
    expected = plain.decode(latents).sample
    assert expected.shape[2] == 6
    assert_close(for_pictures(plain).decode(latents).sample, expected)


def test_videos_stay_as_they_are() -> None:
    plain = small()
    folded = for_pictures(copy.deepcopy(plain))
    latents, frames = torch.randn(1, 12, 2, 4, 3).double(), torch.rand(1, 3, 7, 16, 24).double()
    assert torch.equal(folded.decode(latents).sample, plain.decode(latents).sample)
    assert torch.equal(moments(folded, frames), moments(plain, frames))


def test_weights_keep_their_names(tmp_path: Path) -> None:
    """So the fingerprint is the same, and what is saved loads into diffusers' own; what is loaded is what is computed with."""
    plain = small(torch.float32)
    folded = for_pictures(copy.deepcopy(plain))
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert fingerprint(folded, {}) == fingerprint(plain, {})
    assert for_pictures(folded) is folded  # once more changes nothing
    folded.save_pretrained(tmp_path)
    again = Vae(str(tmp_path))
    assert isinstance(again.model.encoder.block_in.resnets[0].conv1, FoldedConv)
    latents, pictures = torch.randn(1, 12, 1, 4, 3), torch.rand(1, 3, 1, 32, 24)
    assert_close(again.model.decode(latents).sample, plain.decode(latents).sample)
    for parameter in plain.parameters():
        parameter.data.mul_(1.5)
    for vae in (folded, copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        vae.load_state_dict(plain.state_dict())
        assert_close(vae.decode(latents).sample, plain.decode(latents).sample)
        assert_close(moments(vae, pictures), moments(plain, pictures))


def test_fourier_features_of_a_bf16_model() -> None:
    """Pixels of 8 bits are too few for sines of 2^7 periods: with pixels in bf16 two thirds of a latent are lost."""
    exact, folded = small(), lay_out(small(torch.bfloat16))
    pictures = torch.randint(0, 256, (2, 3, 1, 32, 32)) / 127.5 - 1
    expected = moments(exact, pictures.double())

    def error(dtype: torch.dtype) -> float:
        difference = moments(folded, pictures.to(dtype)).double() - expected
        return (difference.square().mean().sqrt() / expected.std()).item()

    assert error(torch.float32) < 0.06 and error(torch.bfloat16) > 0.2


def test_the_loaded_vae_gives_it_pixels_in_fp32(tmp_path: Path) -> None:
    small(torch.float32).save_pretrained(tmp_path)
    pictures = torch.randint(0, 256, (2, 3, 32, 32)) / 127.5 - 1
    expected, found = (Vae(str(tmp_path), dtype=dtype).encode(pictures) for dtype in (torch.float32, torch.bfloat16))
    for one, other in ((found.mean, expected.mean), (found.std, expected.std)):
        assert one.dtype == torch.float32
        assert (one - other).square().mean().sqrt() / other.std() < 0.06


def flops(vae: AutoencoderKLMochi, side: int) -> list[float]:
    """FLOPs of encoding and decoding one picture, in units of 10¹²."""
    counted = []
    for compute, given in ((vae.encode, (1, 3, 1, side, side)), (vae.decode, (1, 12, 1, side // 8, side // 8))):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            compute(torch.empty(given, device="meta"))
        counted.append(counter.get_total_flops() / 1e12)
    return counted


def test_what_a_picture_costs() -> None:
    """The full-size VAE's FLOPs as docs/benchmarks.md states them."""
    with torch.device("meta"):
        vae = AutoencoderKLMochi()
    assert flops(vae, 256) == pytest.approx([0.455, 6.21], rel=2e-3)
    assert flops(vae, 512) == pytest.approx([1.822, 24.86], rel=2e-3)
    for_pictures(vae)
    assert flops(vae, 256) == pytest.approx([0.162, 4.30], rel=3e-3)
    assert flops(vae, 512) == pytest.approx([0.646, 17.19], rel=2e-3)
