"""The schema: columns, stored values, the card and its fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoding import encode, report, rows

from data_prep import schema


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_text_in_8_bits(shape_tars: Path, tmp_path: Path, dtype: str) -> None:
    roots = {"bfloat16": tmp_path / "16", dtype: tmp_path / "8"}
    for kind, root in roots.items():
        assert encode(root, "--input", str(shape_tars / "00000.tar"), "--text-dtype", kind) == 0
    exact, small = rows(roots["bfloat16"]), rows(roots[dtype])
    lost = there = 0.0
    for key, row in exact.items():
        text, other = schema.text_of(row, "bfloat16").float(), schema.text_of(small[key], dtype).float()
        assert schema.text_of(small[key], dtype).dtype == torch.bfloat16
        assert text.shape == other.shape
        # Half a step of the token's own scale, and bf16's rounding of the result.
        step = text.abs().amax(1, keepdim=True) / 127 if dtype == "int8" else text.abs() / 8 + 1e-3
        assert ((other - text).abs() <= 0.5 * step + text.abs() * 2**-8).all()
        lost, there = lost + float((other - text).square().sum()), there + float(text.square().sum())
    assert report(roots[dtype])["text_error"] == pytest.approx((lost / there) ** 0.5, abs=2e-6)
    assert report(roots["bfloat16"])["text_error"] is None
    columns = {kind: report(root)["column_bytes"] for kind, root in roots.items()}
    assert columns[dtype]["text"] * 2 == columns["bfloat16"]["text"]
    assert schema.Card.load(roots[dtype]).fingerprint != schema.Card.load(roots["bfloat16"]).fingerprint


def card(**changes: Any) -> schema.Card:
    vae = {"name": "tiny", "channels": 4, "downsample": 8}
    return schema.Card({"name": "tiny", "width": 16}, vae, 300, "mean_std", [256, 512], **changes)


def test_columns_and_the_names_of_sets() -> None:
    assert list(schema.columns([256], card())) == [
        *("key", "caption", "width", "height", "text", "latent_256_mean", "latent_256_std", "crc32")
    ]
    columns = schema.columns([256, 512], card(text_dtype="int8"))
    assert columns["text"] == "ndarray:uint8" and columns["text_scale"] == "ndarray:float32"
    assert columns["latent_512_std"] == "ndarray:float16"
    assert schema.set_name([512, 256], None) == "256-512"
    assert schema.set_name([256], (15, 17)) == "256_15x17"


@pytest.mark.parametrize(("dtype", "step"), [("bfloat16", 0.0), ("int8", 0.5 / 127), ("float8_e4m3fn", 2**-4)])
def test_a_record_comes_back(dtype: str, step: float) -> None:
    torch.manual_seed(0)
    text = torch.randn(7, 16).bfloat16()
    mean, std = torch.randn(4, 32, 32), torch.rand(4, 32, 32)
    row = schema.to_row(
        schema.Record("a/b/c", "é", text, {256: schema.Latent(mean, std)}, 300, 400), card(text_dtype=dtype)
    )
    assert (row["key"], row["caption"], row["width"], row["height"]) == ("a/b/c", "é", 300, 400)
    latent = schema.latent_of(row, 256)
    assert latent.std is not None
    assert torch.equal(latent.mean, mean.half()) and torch.equal(latent.std, std.half())
    found = schema.text_of(row, dtype)
    assert found.dtype == torch.bfloat16 and found.shape == text.shape
    largest = text.float().abs().amax(1, keepdim=True)
    # The step of 8 bits, and bf16's rounding of the result.
    assert ((found.float() - text.float()).abs() <= step * largest + text.float().abs() * 2**-8 * bool(step)).all()
    assert schema.stored_size(row["text"]) == 7 * 16 * (2 if dtype == "bfloat16" else 1)
    assert schema.stored_size("é") == 2


@pytest.mark.parametrize("posterior", ["mean_std", "mean"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_the_size_of_a_sample_is_that_of_its_row(dtype: str, posterior: str) -> None:
    latents = {
        side: schema.Latent(torch.zeros(4, side // 8, side // 8), torch.zeros(4, side // 8, side // 8))
        for side in (256, 512)
    }
    if posterior == "mean":
        latents = {side: schema.Latent(latent.mean, None) for side, latent in latents.items()}
    row = schema.to_row(schema.Record("a", "b", torch.ones(7, 16).bfloat16(), latents, 1, 1), card(text_dtype=dtype))
    stored = sum(schema.stored_size(value) for name, value in row.items() if name.startswith(("text", "latent")))
    assert stored == schema.sample_bytes((256, 512), 4, 8, 16, 7, dtype, posterior)


def test_a_read_only_row_is_not_written_through() -> None:
    row = schema.to_row(schema.Record("k", "c", torch.ones(1, 16).bfloat16(), {}, 1, 1), card())
    row["text"].flags.writeable = False
    schema.text_of(row, "bfloat16").zero_()
    assert (schema.text_of(row, "bfloat16") == 1).all()


def test_the_card_comes_back_and_its_fingerprint_covers_the_settings(tmp_path: Path) -> None:
    one = card()
    one.save(tmp_path)
    assert schema.Card.load(tmp_path) == one
    assert card(counts={"read": 1}, complete=True, choices={"x": 1}).fingerprint == one.fingerprint
    assert card(text_dtype="int8").fingerprint != one.fingerprint != card(buckets=True).fingerprint
    one.sets = {"a/256": {"resolutions": [256]}, "a/256-512": {"resolutions": [256, 512]}}
    assert list(one.sets_with(512)) == ["a/256-512"] and len(one.sets_with(256)) == 2


def test_a_card_that_is_missing_damaged_or_changed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no data set: dataset\.json is missing"):
        schema.Card.load(tmp_path)
    card().save(tmp_path)
    whole = (tmp_path / schema.CARD).read_text()
    for content, words in (
        (whole.replace('"token_cap": 300', '"token_cap": 301'), "was changed by hand"),
        (whole[:-9], "is damaged or of another version"),
        (whole.replace('"posterior"', '"after"'), "is damaged or of another version"),
    ):
        (tmp_path / schema.CARD).write_text(content)
        with pytest.raises(ValueError, match=words):
            schema.Card.load(tmp_path)


def test_the_null_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"null_text\.safetensors is missing"):
        schema.load_null_text(tmp_path)
    text = torch.randn(2, 16).bfloat16()
    schema.save_null_text(tmp_path, text)
    assert torch.equal(schema.load_null_text(tmp_path), text)
    assert not list((tmp_path / schema.WORK).iterdir())
