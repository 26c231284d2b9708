"""The vision encoder against transformers' own, and its features in a data set: columns, card, report, verify, convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoding import encode, report, rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from data_prep import encode as encode_command
from data_prep import schema, verify
from data_prep.assets.make_tiny_encoders import shown_at
from data_prep.checks.part import sample_problem
from data_prep.convert import main as convert
from data_prep.encoders import Vae, pixels_to_floats
from data_prep.features import VisionEncoder
from data_prep.shapes import draw, scenes

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
KINDS = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, image_size=56, patch_size=14)),
    "dinov2 with registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SIZES, image_size=56, patch_size=14, num_register_tokens=3)
    ),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, image_size=64, patch_size=16, num_register_tokens=3)),
}


def folder_of(root: Path, kind: str = "dinov2") -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    model.save_pretrained(root)
    BitImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(root)
    return root, model


def pictures() -> Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_patches_last_states(kind: str, tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, kind)
    encoder = VisionEncoder(str(folder))
    found = encoder.start_encoding(pictures())
    assert found.shape == (2, 4, 6, 16) and encoder.width == 16 and found.dtype == torch.float16
    pixels = pictures()
    if "dinov2" in kind:
        pixels = nn.functional.interpolate(pixels, (56, 84), mode="bicubic", antialias=True)
    pixels = ((pixels + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        states = model(pixel_values=pixels).last_hidden_state
    extra = {"dinov2": 1, "dinov2 with registers": 4, "dinov3": 4}[kind]
    for row in range(4):
        for column in range(6):
            expected = states[:, extra + 6 * row + column]
            torch.testing.assert_close(found[:, row, column].float(), expected, rtol=2e-3, atol=2e-3)


def test_the_fingerprint_covers_weights_and_normalisation(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path)
    one = VisionEncoder(str(folder)).fingerprint
    assert VisionEncoder(str(folder)).fingerprint == one
    BitImageProcessor(image_mean=STD, image_std=STD).save_pretrained(folder)
    assert VisionEncoder(str(folder)).fingerprint != one
    folder_of(tmp_path)
    with torch.no_grad():
        model.layernorm.bias[0] += 1
    model.save_pretrained(folder)
    assert VisionEncoder(str(folder)).fingerprint != one


def test_what_is_no_vision_encoder_is_refused_in_one_line(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "v")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(
        ValueError, match=r"holds no vision encoder .*'t5' is not supported; expected one of dinov2"
    ) as refusal:
        VisionEncoder(str(folder))
    assert "\n" not in str(refusal.value)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of its tensors: layernorm\.bias"):
        VisionEncoder(str(folder))
    (folder / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: expected image_mean and image_std"):
        VisionEncoder(str(folder))


def test_the_tiny_one_tells_objects_and_colours_in_pictures_that_it_was_not_trained_on() -> None:
    """By a linear map of its features, patch by patch; without looking, 76% and 22% are right."""
    encoder, vectors, shown = VisionEncoder("tiny"), [], []
    for scene in scenes(30, seed=9):
        pixels = pixels_to_floats(torch.from_numpy(np.asarray(draw(scene, 256)).copy())[None], torch.device("cpu"))
        vectors.append(encoder.start_encoding(pixels)[0].float().flatten(0, 1))
        shape, colour = torch.from_numpy(shown_at(scene, 16))
        shown.append(torch.stack([(shape > 0).long(), colour]))
    x, y_2N = torch.cat(vectors), torch.cat(shown, dim=1)
    x, half = torch.cat([x, torch.ones(len(x), 1)], dim=1), len(x) // 2
    for y in y_2N:
        classes = nn.functional.one_hot(y, 8).float()
        weights = torch.linalg.lstsq(x[:half], classes[:half]).solution
        assert ((x[half:] @ weights).argmax(1) == y[half:]).float().mean() > 0.95


# ---- in a data set ----


@pytest.fixture(scope="module")
def sets(shape_tars: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tar encoded without features, and with features of 16 values in each dtype."""
    folder = tmp_path_factory.mktemp("features")
    encoder, _ = folder_of(folder / "encoder")
    roots = {kind: folder / kind for kind in ("none", *schema.FEATURE_DTYPES)}
    for kind, root in roots.items():
        options = [] if kind == "none" else ["--features", str(encoder), "--features-dtype", kind]
        assert encode(root, "--input", str(shape_tars / "00000.tar"), *options) == 0
    return roots


def test_stored_features_are_those_of_the_decoded_crops(sets: dict[str, Path]) -> None:
    stored, vae = rows(sets["float16"]), Vae("tiny")
    encoder = VisionEncoder(str(sets["none"].parent / "encoder"))
    for row in list(stored.values())[:3]:
        found = schema.features_of(row, 64, "float16")
        assert found.shape == (4, 4, 16) and found.dtype == torch.float16
        # The picture comes back from its latent, about: so the features are of the same crop.
        back = encoder.start_encoding(vae.decode(schema.latent_of(row, 64).mean[None].float()))[0]
        assert torch.cosine_similarity(found.float(), back.float(), dim=-1).mean() > 0.9


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_features_in_8_bits(dtype: str, sets: dict[str, Path]) -> None:
    exact, small, lost, there = rows(sets["float16"]), rows(sets[dtype]), 0.0, 0.0
    for key, row in exact.items():
        whole = schema.features_of(row, 64, "float16").float()
        other = schema.features_of(small[key], 64, dtype)
        assert other.dtype == torch.float16 and other.shape == whole.shape
        # Half a step of the vector's own scale, and fp16's rounding of the result.
        step = whole.abs().amax(-1, keepdim=True) / 127 if dtype == "int8" else whole.abs() / 8 + 1e-2
        assert ((other.float() - whole).abs() <= 0.5 * step + whole.abs() * 2**-10).all()
        lost, there = lost + float((other.float() - whole).square().sum()), there + float(whole.square().sum())
    assert report(sets[dtype])["features_error"] == pytest.approx((lost / there) ** 0.5, abs=2e-6)
    assert "8-bit features differ from 16 bits by" in (sets[dtype] / "report.txt").read_text()
    assert "features_error" not in report(sets["float16"])
    bytes_of = {kind: report(sets[kind])["column_bytes"] for kind in ("float16", dtype)}
    assert bytes_of[dtype]["features_64"] * 2 == bytes_of["float16"]["features_64"] == len(exact) * 4 * 4 * 16 * 2
    assert bytes_of[dtype]["features_64_scale"] == len(exact) * 4 * 4 * 4


def test_a_data_set_without_features_knows_nothing_of_them(sets: dict[str, Path]) -> None:
    """Card, columns and reports are what they were; with features all other columns are the same to the bit."""
    plain = sets["none"]
    for name in ("dataset.json", "report.json", "report.txt"):
        assert "feature" not in (plain / name).read_text()
    one, other = rows(plain), rows(sets["float16"])
    for key, row in one.items():
        assert other[key].keys() - row.keys() == {"features_64"}
        for column in row.keys() - {"crc32"}:
            assert np.array_equal(row[column], other[key][column])
    card = schema.Card.load(sets["int8"])
    encoder = VisionEncoder(str(plain.parent / "encoder"))
    assert card.features == {
        "name": encoder.name,
        "width": 16,
        "cell": 16,
        "dtype": "int8",
        "fingerprint": encoder.fingerprint,
    }
    assert len({schema.Card.load(root).fingerprint for root in sets.values()}) == 4


def test_verify_and_convert_know_them(
    sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("float16", "float8_e4m3fn"):
        assert verify.main([str(sets[kind])]) == 0, capsys.readouterr().out
        assert convert([str(sets[kind]), "--to", "webdataset", "--output", str(tmp_path / kind)]) == 0
    import tarfile

    (tar,) = (tmp_path / "float8_e4m3fn").rglob("*.tar")
    with tarfile.open(tar) as file:
        member = file.extractfile("000000.safetensors")
        key = json.loads(file.extractfile("000000.json").read())["key"]  # type: ignore[union-attr]
        from safetensors.torch import load

        tensors = load(member.read())  # type: ignore[union-attr]
    assert tensors["features_64"].dtype == torch.float8_e4m3fn
    expected = schema.features_of(rows(sets["float8_e4m3fn"])[key], 64, "float8_e4m3fn")
    found = tensors["features_64"].float() * tensors["features_64_scale"][..., None]
    assert torch.equal(found.half(), expected)


def test_damaged_features_are_named(sets: dict[str, Path]) -> None:
    card, details = schema.Card.load(sets["int8"]), {"resolutions": [64], "bucket": None}
    key, row = next(iter(rows(sets["int8"]).items()))
    part = key.rpartition("/")[0]
    assert sample_problem(row, part, card, details) is None
    zero = np.zeros_like(row["features_64_scale"])
    for change, words in (
        ({"features_64": row["features_64"][:3]}, r"features_64 is (3, 4, 16), expected (4, 4, 16)"),
        ({"features_64_scale": zero}, "features_64_scale is not (4, 4), or not above 0 everywhere"),
        ({"features_64_scale": zero + np.inf}, "features_64 is not finite"),
    ):
        assert sample_problem({**row, **change}, part, card, details) == words


def test_other_features_are_other_settings(
    sets: dict[str, Path], shape_tars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = ["--input", str(shape_tars / "00000.tar")]
    assert encode(sets["int8"], *tar) == 1
    assert "was made with other settings" in (said := capsys.readouterr().err) and "features: there {" in said
    assert encode(sets["none"], *tar, "--features", "tiny") == 1
    assert "features: there None, now {'name': 'tiny'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--features", "tiny", "--resolutions", "72"], "with --features sizes must be divisible by 16"),
        (["--features-dtype", "int8"], "--features-dtype is of the features, and there are none: give --features, too"),
    ],
)
def test_wrong_options(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        encode_command.parse(["--input", "a.tar", "--output", "out", "--encoders", "tiny", *options])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("dtype", schema.FEATURE_DTYPES)
def test_the_size_of_a_sample_counts_them(dtype: str) -> None:
    about = {"name": "tiny", "width": 24, "cell": 16, "dtype": dtype, "fingerprint": ""}
    vae = {"name": "tiny", "channels": 4, "downsample": 8}
    card = schema.Card({"name": "tiny", "width": 16}, vae, 300, "mean", [256, 512], features=about)
    latents = {side: schema.Latent(torch.zeros(4, side // 8, side // 8), None) for side in (256, 512)}
    features = {side: torch.rand(side // 16, side // 16, 24).half() for side in (256, 512)}
    row = schema.to_row(schema.Record("a", "b", torch.ones(7, 16).bfloat16(), latents, 1, 1, features=features), card)
    stored = sum(schema.stored_size(v) for name, v in row.items() if name.startswith(("text", "latent", "features")))
    assert stored == schema.sample_bytes((256, 512), 4, 8, 16, 7, "bfloat16", "mean", 24, dtype)
    assert set(row) == set(schema.columns([256, 512], card)) - {"crc32"}
