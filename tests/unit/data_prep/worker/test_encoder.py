"""The encoder of a worker: pictures of several shapes, and captions that are too long."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
from encoding import encode, jpeg, report, rows, write_pictures

from data_prep import schema
from data_prep.pictures.images import BUCKETS, bucket_of, shape_of


def test_buckets_keep_the_aspect_ratio(tmp_path: Path) -> None:
    sizes = {"wide": (700, 420), "tall": (300, 620), "square": (600, 600), "small": (256, 300), "flat": (900, 260)}
    write_pictures(tmp_path / "0.tar", {k: (jpeg(*size), {"caption": k}) for k, size in sizes.items()})
    root = tmp_path / "data"
    options = ("--resolutions", "256", "512", "--buckets")
    assert encode(root, "--input", str(tmp_path / "0.tar"), *options) == 0
    found = rows(root)
    card = schema.Card.load(root)
    assert card.buckets
    for key, row in found.items():
        name = key.rpartition("/")[2]
        bucket = bucket_of(*sizes[name])
        height, width = shape_of(bucket, 256)
        assert row["latent_256_mean"].shape == (4, height // 8, width // 8)
        if "latent_512_mean" in row:
            assert row["latent_512_mean"].shape == (4, height // 4, width // 4)
    assert set(found) == {f"images/0/{n}" for n in ("wide", "tall", "square", "small", "flat")} - {
        f"images/0/{n}"
        for n, (w, h) in sizes.items()
        if (s := shape_of(bucket_of(w, h), 256)) and (h < s[0] or w < s[1])
    }
    for name, about in card.sets.items():
        assert tuple(about["bucket"]) in BUCKETS
        assert name == f"images/{'-'.join(map(str, about['resolutions']))}_{about['bucket'][0]}x{about['bucket'][1]}"
    assert {tuple(s["bucket"]) for s in card.sets.values()} >= {bucket_of(700, 420), (16, 16)}


def test_long_captions_are_dropped_if_asked(tmp_path: Path) -> None:
    write_pictures(
        tmp_path / "0.tar",
        {"a": (jpeg(64, 64), {"caption": "a red circle"}), "b": (jpeg(64, 64), {"caption": "red " * 40})},
    )
    root = tmp_path / "data"
    assert encode(root, "--input", str(tmp_path), "--token-cap", "16", "--long-captions", "drop") == 0
    assert set(rows(root)) == {"images/0/a"}
    assert report(root)["dropped"] == {"caption_too_long": 1}


def test_the_small_vae_warns_of_photographs_and_takes_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph = (Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg").read_bytes()
    for name, picture in (("photographs", photograph), ("shapes", jpeg(256, 256))):
        tar = write_pictures(tmp_path / name / "0.tar", {key: (picture, {"caption": key}) for key in "ab"})
        assert encode(tmp_path / f"{name}_set", "--input", str(tar), "--resolutions", "256") == 0
        said = capsys.readouterr().out
        warnings = [line for line in said.splitlines() if "the VAE tiny was trained on drawn shapes" in line]
        assert len(warnings) == (name == "photographs")
        assert all("for photographs take --encoders flan-t5-xxl+mochi" in line for line in warnings)
