"""What users choose when they encode: sources, captions, filters, buckets, duplicates, 8-bit text, compression, long captions."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import StreamingDataset
from support import contents

from data_prep import schema
from data_prep.encode import main
from data_prep.inputs.sources import read_sources
from data_prep.pictures.images import BUCKETS, bucket_of, shape_of
from data_prep.shapes import draw, scenes, tar_of, write_tars


def jpeg(width: int, height: int, seed: int = 0, quality: int = 95) -> bytes:
    out = io.BytesIO()
    draw(next(scenes(1, seed)), 512).resize((width, height)).save(out, "JPEG", quality=quality)
    return out.getvalue()


def write(path: Path, samples: dict[str, tuple[bytes, dict]]) -> Path:
    """A tar of pictures with the json given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tar_of(path) as tar:
        for key, (picture, about) in samples.items():
            tar.write({"__key__": key, "jpg": picture, "json": json.dumps(about).encode()})
    return path


def encode(output: Path, *options: str) -> int:
    return main(["--output", str(output), "--encoders", "tiny", "--decoders", "1", "--resolutions", "64", *options])


def rows(root: Path) -> dict[str, dict]:
    """All samples by key."""
    card = schema.Card.load(root)
    sets = [StreamingDataset(local=str(root / name), batch_size=1) for name in card.sets]
    return {row["key"]: row for one in sets for row in one}


def report(root: Path) -> dict:
    return json.loads((root / "report.json").read_text())


def test_several_sources_each_with_captions_and_a_filter(tmp_path: Path, capsys) -> None:
    good, bad = {"aesthetic_score": 6, "pwatermark": 0.1}, {"aesthetic_score": 5, "pwatermark": 0.1}
    write(
        tmp_path / "a" / "0.tar",
        {
            "k0": (jpeg(96, 96), {"caption": "one", **good}),
            "k1": (jpeg(96, 96), {"caption": "two", **bad}),
            "k2": (jpeg(96, 96), {"caption": "three", **good, "pwatermark": 0.9}),
            "k3": (jpeg(96, 96), {"caption": "four", "pwatermark": 0.1}),
            "k4": (jpeg(160, 64), {"caption": "five", **good}),
        },
    )
    many = {f"m{i}": (jpeg(64, 64, i), {"long": f"long {i}", "short": f"short {i}"}) for i in range(60)}
    write(tmp_path / "b" / "0.tar", many)
    (tmp_path / "sources.yaml").write_text(
        f"""
        sources:
          first:
            tars: {tmp_path}/a
            filter: aesthetic >= 5.5 and watermark < 0.5 and aspect <= 2
          second:
            tars: ["{tmp_path}/b/*.tar"]
            captions: {{long: 0.75, short: 0.25}}
        """
    )
    root = tmp_path / "data"
    assert encode(root, "--sources", str(tmp_path / "sources.yaml")) == 0
    found = rows(root)
    assert found.pop("first/0/k0")["caption"] == "one"
    assert set(found) == {f"second/0/m{i}" for i in range(60)}
    drawn = Counter(row["caption"].split()[0] for row in found.values())
    assert 35 <= drawn["long"] <= 55  # three quarters
    assert all(row["caption"].split()[1] == key.partition("/m")[2] for key, row in found.items())
    whole = report(root)
    assert whole["sources"]["first"]["dropped"] == {
        "filtered by aesthetic >= 5.5": 1,
        "filtered by aspect <= 2": 1,
        "filtered by watermark < 0.5": 1,
        "no field aesthetic": 1,
    }
    assert whole["read"] == 65 == whole["written"] + 4
    lines = [json.loads(s) for s in (root / "reports" / "first" / "0.jsonl").read_text().splitlines()]
    assert [(r["key"], r["detail"]) for r in lines[:2]] == [("k1", "aesthetic_score = 5"), ("k2", "pwatermark = 0.9")]
    assert "first" in capsys.readouterr().out
    # Another source may join; one that is there may not change.
    write(tmp_path / "c" / "0.tar", {"n": (jpeg(64, 64), {"caption": "new"})})
    (tmp_path / "sources.yaml").write_text(
        f"sources: {{second: {{tars: {tmp_path}/b, captions: {{long: 0.75, short: 0.25}}}}, third: {{tars: {tmp_path}/c}}}}"
    )
    assert encode(root, "--sources", str(tmp_path / "sources.yaml")) == 0
    assert len(rows(root)) == 62
    (tmp_path / "sources.yaml").write_text(f"sources: {{second: {{tars: {tmp_path}/b, captions: long}}}}")
    assert encode(root, "--sources", str(tmp_path / "sources.yaml")) == 1
    assert "source second: there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sources: {}", "there are none"),
        ("sources: {a: {}}", "sources.a.tars: Field required"),
        ("sources: {a: {tars: x, filters: y}}", "sources.a.filters: Extra inputs are not permitted"),
        ("sources: {work: {tars: x}, b c: {tars: y}}", "a name has letters, digits, - and _ only"),
        ("sources: {a: {tars: x, filter: aesthetic = 5}}", "sources.a: "),
        ("sources: {a: {tars: x, captions: {long: 0}}}", "sources.a: captions"),
        ("sources: [", "is no YAML"),
        ("!!python/object/apply:os.system [id]", "is no YAML"),
    ],
)
def test_a_file_of_sources_that_is_wrong(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"s\.yaml") as error:
        read_sources(tmp_path / "s.yaml")
    assert words in str(error.value)


def test_buckets_keep_the_aspect_ratio(tmp_path: Path) -> None:
    sizes = {"wide": (700, 420), "tall": (300, 620), "square": (600, 600), "small": (256, 300), "flat": (900, 260)}
    write(tmp_path / "0.tar", {k: (jpeg(*size), {"caption": k}) for k, size in sizes.items()})
    root = tmp_path / "data"
    options = ("--encoders", "tiny", "--decoders", "1", "--resolutions", "256", "512", "--buckets")
    assert main(["--input", str(tmp_path / "0.tar"), "--output", str(root), *options]) == 0
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


def test_compressed_shards_hold_the_same(shape_tars: Path, tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    assert encode(plain, "--input", str(shape_tars / "00000.tar")) == 0
    assert encode(packed, "--input", str(shape_tars / "00000.tar"), "--compression", "zstd:3") == 0
    assert {p.suffix for p in packed.rglob("shard.*")} == {".zstd"}
    one = rows(plain)
    card = schema.Card.load(packed)
    unpacked = StreamingDataset(
        remote=str(packed / next(iter(card.sets))), local=str(tmp_path / "cache"), batch_size=1, validate_hash="sha256"
    )
    for row in unpacked:
        for column, value in row.items():
            np.testing.assert_array_equal(value, one[row["key"]][column])
    assert report(packed)["column_bytes"] == report(plain)["column_bytes"]


def test_long_captions_are_dropped_if_asked(tmp_path: Path) -> None:
    write(
        tmp_path / "0.tar",
        {"a": (jpeg(64, 64), {"caption": "a red circle"}), "b": (jpeg(64, 64), {"caption": "red " * 40})},
    )
    root = tmp_path / "data"
    assert encode(root, "--input", str(tmp_path), "--token-cap", "16", "--long-captions", "drop") == 0
    assert set(rows(root)) == {"images/0/a"}
    assert report(root)["dropped"] == {"caption_too_long": 1}


@pytest.mark.parametrize("method", ["exact", "perceptual"])
def test_duplicates_across_tars_are_stored_once(tmp_path: Path, method: str) -> None:
    """The first copy that would be written stays, whichever tar is read first; other samples take no part."""
    tars = tmp_path / "tars"
    about = {"caption": "a picture", "score": 1}
    write(
        tars / "0.tar",
        {
            "filtered": (jpeg(96, 96, 1), {**about, "score": 0}),  # the later copy of it must stay
            "small": (jpeg(48, 48, 2), about),
            "first": (jpeg(96, 96, 3), about),
        },
    )
    write(
        tars / "1.tar",
        {
            "again": (jpeg(96, 96, 3), about),
            "smaller": (jpeg(80, 80, 3, quality=60), about),
            "one": (jpeg(96, 96, 1), about),
            "two": (jpeg(96, 96, 2), about),
        },
    )
    expected = {"0/first", "1/one", "1/two"} | ({"1/smaller"} if method == "exact" else set())
    options = ("--filter", "score > 0", "--duplicates", method)
    outputs = []
    for order in ("0", "1"):
        root = tmp_path / f"data{order}"
        if order == "1":  # as if another worker had read the second tar first
            assert encode(root, "--input", str(tars), *options) == 0
            (root / "reports" / "images" / "0.json").unlink()
        assert encode(root, "--input", str(tars), *options) == 0
        assert set(rows(root)) == {f"images/{name}" for name in expected}
        outputs.append(contents(root))
    assert outputs[0] == outputs[1]
    rejects = [json.loads(s) for s in (root / "reports" / "images" / "1.jsonl").read_text().splitlines()]
    assert {(r["key"], r["reason"], r["detail"]) for r in rejects} >= {("again", "duplicate", "of images/0/first")}
    assert report(root)["read"] == 7


def test_the_report_is_readable_and_has_pictures(tmp_path: Path, capsys) -> None:
    rng = random.Random(0)
    write_tars(tmp_path / "tars", 24, seed=rng.randrange(9), per_tar=8, small_share=0.5)
    root = tmp_path / "data"
    assert encode(root, "--input", str(tmp_path / "tars")) == 0
    said = capsys.readouterr().out
    assert "for all 3 tars, judged by this one" in said
    text = (root / "report.txt").read_text()
    assert text.startswith("read 24 = written 24 + dropped 0, from 3 tars\n")
    assert "bytes per sample; captions padded to 300 tokens in 16 bits would make it" in text
    whole = report(root)
    assert sum(whole["tokens"].values()) == sum(whole["sizes"].values()) == 24
    assert set(whole["sizes"]) == {"320", "512"}
    per = whole["bytes_per_sample"]
    assert per["stored"] == pytest.approx(whole["stored_bytes"] / 24, abs=0.1)
    latents = sum(n for column, n in whole["column_bytes"].items() if not column.startswith("text"))
    assert per["padded_fp16"] == pytest.approx(latents / 24 + 300 * 128 * 2, abs=0.1)
    for name in ("report_tokens.png", "report_sizes.png"):
        picture = Image.open(root / name)
        assert picture.width > 500
        assert len(np.unique(np.asarray(picture.convert("L")))) > 2  # something is drawn
    disk = sum(p.stat().st_size for p in root.rglob("*.mds"))
    assert whole["stored_bytes"] == disk
