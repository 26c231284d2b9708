"""The frozen encoders: the real loading code on small models made here, and the tiny ones that ship."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLMochi
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from data_prep.encoders import (
    TextEncoder,
    Vae,
    batches_by_length,
    encode_tokens,
    pixels_to_floats,
    require_fingerprint,
)
from data_prep.pictures.grids import to_image
from data_prep.shapes import check, draw, scenes
from data_prep.weights import ASSETS


@pytest.fixture(scope="module")
def tiny_vae() -> Vae:
    return Vae("tiny")


def small_mochi(folder: Path) -> Path:
    torch.manual_seed(0)
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        latent_channels=12,
        layers_per_block=(1, 1, 1, 1, 1),
        add_attention_block=(False, False, False, False, False),
    )
    vae.save_pretrained(folder)
    return folder


def test_tiny_vae_really_reconstructs(tiny_vae: Vae) -> None:
    some = list(scenes(9, seed=31))
    pixels = torch.from_numpy(np.stack([np.asarray(draw(s, 256)) for s in some]))
    pictures = pixels_to_floats(pixels, torch.device("cpu"))
    latents = tiny_vae.encode(pictures)
    assert latents.mean.shape == (9, 4, 32, 32)
    assert latents.mean.std(dim=(0, 2, 3)).sub(1).abs().max() < 0.4  # normalised per channel
    output = tiny_vae.decode(latents.mean)
    assert (output - pictures).square().mean() < 0.01
    for picture, scene in zip(output, some, strict=True):
        verdict = check(to_image(picture), scene)
        assert verdict.colours and verdict.shapes is not False


def test_mochi_with_one_frame(tmp_path: Path) -> None:
    vae = Vae(str(small_mochi(tmp_path)))
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = vae.encode(pictures)
    assert latents.mean.shape == latents.std.shape == (2, 12, 8, 8)
    posterior = vae.model.encode(pictures[:, :, None]).latent_dist
    config = vae.model.config
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
    torch.testing.assert_close(latents.mean, (posterior.mean[:, :, 0] - mean) / std * config.scaling_factor)
    torch.testing.assert_close(latents.std, posterior.std[:, :, 0] / std * config.scaling_factor)
    assert vae.decode(latents.mean).shape == (2, 3, 64, 64)


def test_autoencoder_kl_with_shift_and_scale(tmp_path: Path) -> None:
    AutoencoderKL(
        block_out_channels=[8, 8, 8, 8],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(tmp_path)
    vae = Vae(str(tmp_path))
    pictures = torch.rand(1, 3, 32, 32)
    posterior = vae.model.encode(pictures).latent_dist
    torch.testing.assert_close(vae.encode(pictures).mean, (posterior.mean - 0.25) * 0.5)
    torch.testing.assert_close(vae.encode(pictures).std, posterior.std * 0.5)


def test_text_is_unpadded_and_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=200, d_model=32, d_kv=8, num_heads=2, d_ff=64, num_layers=2)).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(ASSETS / "tiny_t5").save_pretrained(tmp_path)
    encoder = TextEncoder(str(tmp_path))
    captions = ["a red circle", "", "a small purple triangle above a large white square on a black background"]
    together, cut = encoder.encode(captions, 300)
    assert cut == {}
    assert len(together[1]) == 1
    for caption, text in zip(captions, together, strict=True):
        assert text.dtype == torch.bfloat16
        alone = encoder.encode([caption], 300)[0][0]
        assert alone.shape == text.shape == (len(encoder.tokenizer(caption).input_ids), 32)
        torch.testing.assert_close(text.float(), alone.float(), rtol=2e-2, atol=2e-2)


def test_a_long_caption_is_cut_and_keeps_its_end() -> None:
    encoder = TextEncoder("tiny")
    texts, cut = encoder.encode(["a red circle", "a red circle and much more behind it"], 6)
    assert cut == {1: "d much more behind it"}
    assert len(texts[1]) == 6


def test_batches_hold_all_captions_within_the_budget() -> None:
    lengths = [random.Random(0).randint(1, 300) for _ in range(500)] + [300, 1]
    batches = batches_by_length(lengths, 2000)
    assert sorted(n for batch in batches for n in batch) == list(range(len(lengths)))
    padded = [len(batch) * max(lengths[n] for n in batch) for batch in batches]
    assert max(padded) <= 2000
    assert sum(padded) < 1.1 * sum(lengths)  # neighbours in length: little padding
    assert batches_by_length([5000, 3], 2000) == [[0], [1]]  # alone, if it must be


def test_large_batches_change_no_embedding() -> None:
    encoder = TextEncoder("tiny")
    captions = [s.caption for s in scenes(40, seed=3)]
    ids = encoder.tokenizer(captions).input_ids
    together = encode_tokens(encoder.model, ids, encoder.tokenizer.pad_token_id, encoder.device)
    in_turn = encode_tokens(encoder.model, ids, encoder.tokenizer.pad_token_id, encoder.device, budget=30)
    for one, other, i in zip(together, in_turn, ids, strict=True):
        assert len(one) == len(i)
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2)


def test_the_fingerprint_sees_weights_and_not_how_they_were_loaded(tmp_path: Path) -> None:
    first = Vae(str(small_mochi(tmp_path)))
    assert Vae(str(tmp_path), dtype=torch.bfloat16).fingerprint == first.fingerprint
    with torch.no_grad():
        next(first.model.parameters())[0] += 0.5
    first.model.save_pretrained(tmp_path)
    assert Vae(str(tmp_path)).fingerprint != first.fingerprint


def test_another_encoder_is_refused_by_its_fingerprint() -> None:
    require_fingerprint("VAE", "tiny", "a" * 64, "a" * 64)
    words = (
        "the VAE tiny is not the one that this model was trained with: its fingerprint is a{12}, expected b{12}; put"
    )
    with pytest.raises(ValueError, match=words):
        require_fingerprint("VAE", "tiny", "a" * 64, "b" * 64, "this model was trained with")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no VAE: config\.json is missing"):
        Vae(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ValueError, match="'VQModel' is not supported"):
        Vae(str(tmp_path))
    with pytest.raises(ValueError, match="holds no T5 encoder"):
        TextEncoder(str(tmp_path))


def test_the_shipped_encoders_are_small() -> None:
    assert sum(p.stat().st_size for p in ASSETS.rglob("*")) < 3 << 20


def test_the_tiny_text_encoder_binds_colours_to_shapes() -> None:
    """The circle's embedding tells its colour: nearest neighbours among other captions share it."""
    encoder, rng = TextEncoder("tiny"), random.Random(0)
    colours = ["red", "green", "blue", "yellow"]
    captions, labels = [], []
    for _ in range(80):
        first, second = rng.sample(colours, 2)
        shape = rng.choice(["square", "triangle"])
        captions.append(f"a small {first} circle above a large {second} {shape} on a white background")
        labels.append(first)
    texts = encoder.encode(captions, 300)[0]
    circle = encoder.tokenizer("circle", add_special_tokens=False).input_ids[0]
    ids = encoder.tokenizer(captions).input_ids
    points = torch.stack([t[row.index(circle)] for t, row in zip(texts, ids, strict=True)]).float()
    distance = torch.cdist(points, points) + torch.eye(80) * 1e9
    nearest = distance.argmin(1)
    assert sum(labels[i] == labels[j] for i, j in enumerate(nearest.tolist())) >= 76
