"""The encode command on real tars: what is written, what is dropped and why, and what a second run does."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset
from PIL import Image
from streaming import StreamingDataset
from support import ROOT, contents

from data_prep import schema
from data_prep.encode import main, parse
from data_prep.shapes import draw, scenes
from data_prep.worker.parts import whole_parts


def jpeg(side: int, seed: int = 0) -> bytes:
    out = io.BytesIO()
    draw(next(scenes(1, seed)), side).save(out, "JPEG", quality=95)
    return out.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with webdataset.TarWriter(str(path)) as tar:
        for key, members in samples.items():
            tar.write({"__key__": key, **members})
    return path


def encode(tars: str, output: Path, *more: str) -> int:
    return main(["--input", tars, "--output", str(output), "--encoders", "tiny", *more])


def test_bad_input_is_counted_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, small, tiny = jpeg(512), jpeg(300), io.BytesIO()
    Image.new("RGB", (1, 1)).save(tiny, "PNG")
    bomb = io.BytesIO()
    Image.new("1", (30000, 30000)).save(bomb, "PNG")
    tar = write_tar(
        tmp_path / "00000.tar",
        {
            "a": {"jpg": good, "txt": b"a circle"},
            "b": {"jpg": b"no image at all", "txt": b"words"},
            "c": {"jpg": good, "txt": b"   "},
            "d": {"jpg": good, "txt": b"\xff\xfe\xff"},
            "e": {"png": tiny.getvalue(), "txt": b"a dot"},
            "f": {"png": bomb.getvalue(), "txt": b"a bomb"},
            "g": {"jpg": good[: len(good) // 2], "txt": b"half"},
            "h": {"jpg": small, "json": json.dumps({"caption": "a small one"}).encode()},
            "i": {"txt": b"no picture"},
            "j": {"jpg": good},
            "z": {"jpg": good, "txt": b"cut off"},
        },
    )
    with tarfile.open(tar) as whole:
        last = whole.getmember("z.jpg")
    tar.write_bytes(tar.read_bytes()[: last.offset_data + last.size // 2])
    assert encode(str(tar), tmp_path / "data") == 0
    reports = tmp_path / "data" / "reports" / "images"
    report = json.loads((reports / "00000.json").read_text())
    assert report["written"] == {"256-512": 1, "256": 1}
    assert report["dropped"] == {
        "broken_image": 1,
        "caption_not_utf8": 1,
        "empty_caption": 1,
        "no_caption": 1,
        "no_image": 1,
        "too_large": 1,
        "too_small": 1,
        "truncated_tar": 1,
        "unsupported_format": 1,
    }
    assert report["read"] == 11 == sum(report["written"].values()) + sum(report["dropped"].values())
    rejects = [json.loads(line) for line in (reports / "00000.jsonl").read_text().splitlines()]
    assert {r["key"]: r["reason"] for r in rejects}["f"] == "too_large"
    assert {r["tar"] for r in rejects} == {str(tar)}
    assert [r["key"] for r in rejects] == [*"bcdefgijz"]  # in the tar's order
    assert "read 11 = written 2 + dropped 9" in capsys.readouterr().out


def test_records_come_back_as_they_were(data_set: Path) -> None:
    card = schema.Card.load(data_set)
    assert set(card.sets) == {"images/256", "images/256-512"}
    keys = []
    for name, resolutions in (("images/256", [256]), ("images/256-512", [256, 512])):
        rows = StreamingDataset(local=str(data_set / name), shuffle=False, batch_size=1)
        assert len(rows) == card.sets[name]["samples"]
        for row in rows:
            keys.append(row["key"])
            text = schema.text_of(row, card.text_dtype)
            assert text.dtype == torch.bfloat16 and text.shape[1] == 128
            assert text.float().std() > 0
            assert (min(row["width"], row["height"]) >= 512) == (resolutions == [256, 512])
            for r in resolutions:
                latent = schema.latent_of(row, r)
                assert latent.mean.shape == (4, r // 8, r // 8) and latent.std is not None
                assert 0.2 < latent.mean.std() < 2
                assert latent.std.min() >= 0
            assert "latent_512_mean" in row or resolutions == [256]
    assert len(keys) == len(set(keys)) == card.counts["written"]
    assert schema.load_null_text(data_set).shape == (1, 128)


def test_a_second_run_makes_only_what_is_missing(data_set: Path, shape_tars: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "data"
    shutil.copytree(data_set, root)
    before = contents(root)
    # As if killed in the second tar: its report is missing, its shards are there, and a temporary folder is left.
    (root / "reports" / "images" / "00001.json").unlink()
    leftover = root / "work" / "parts" / "images" / "00001" / "dead" / "256"
    leftover.mkdir(parents=True)
    (root / "images" / "256-512" / "00001" / "index.json").write_bytes(b"half")
    assert encode(f"{shape_tars}/*.tar", root) == 0
    assert "2 tars, 1 of them already encoded" in capsys.readouterr().out
    assert contents(root) == before
    assert not list((root / "work" / "parts").glob("*/*"))


def test_mean_alone_and_a_token_cap(shape_tars: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "data"
    options = ("--posterior", "mean", "--resolutions", "256", "--token-cap", "5")
    assert encode(f"{shape_tars}/00000.tar", root, *options) == 0
    row = StreamingDataset(local=str(root / "images" / "256"), shuffle=False, batch_size=1)[0]
    assert schema.latent_of(row, 256).std is None
    assert len(schema.text_of(row, "bfloat16")) == 5
    assert "10 captions were cut to 5 tokens" in capsys.readouterr().out


def test_refusals(data_set: Path, shape_tars: Path, tmp_path: Path, capsys) -> None:
    """Each is one line on stderr and exit code 1."""
    tars = f"{shape_tars}/*.tar"
    root = tmp_path / "data"
    shutil.copytree(data_set, root)
    assert encode(tars, root, "--token-cap", "77") == 1
    assert "token_cap: there 300, now 77" in capsys.readouterr().err
    assert encode(str(tmp_path / "none" / "*.tar"), root) == 1
    assert "no such file" in capsys.readouterr().err
    double = tmp_path / "double"
    for sub in ("x", "y"):
        (double / sub).mkdir(parents=True)
        shutil.copy(shape_tars / "00000.tar", double / sub)
    assert encode(f"{double}/**/*.tar", root) == 1
    assert "would both become the part 00000 of images" in capsys.readouterr().err
    shutil.copy(shape_tars / "00001.tar", double / "x" / "00000.tar")
    assert encode(f"{double}/x/*.tar", root) == 1
    error = capsys.readouterr().err
    assert "changed since they were encoded: 1" in error and "--changed remake" in error
    for spec, words in (("tiny+nothing/here/at", "no weights at"), ("one+two+three", "expected `tiny` or TEXT+VAE")):
        assert main(["--input", tars, "--output", str(root), "--encoders", spec]) == 1
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error
    text = tmp_path / "text.tar"
    text.write_text("this is no tar")
    assert encode(str(text), tmp_path / "other") == 1
    said = capsys.readouterr()
    assert "no_tar" in said.out and "not one sample was written" in said.err


@pytest.mark.parametrize(
    "options",
    [
        ["--resolutions", "250"],
        ["--resolutions", "320", "--buckets"],
        ["--token-cap", "0"],
        ["--compression", "gzip"],
        ["--shard-mb", "4096"],
        ["--work", "w"],
        ["--output", "s3://bucket/data"],
        ["--output", "pipe:cat"],
        ["--duplicate-distance", "9"],
        ["--sources", "s.yaml"],
    ],
)
def test_options_out_of_range(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--input", "x", "--output", "y", "--encoders", "tiny", *options])


@pytest.mark.parametrize("command", ["encode", "verify", "shapes"])
def test_the_commands_run_by_their_paths(command: str) -> None:
    """`python data_prep/encode.py` puts data_prep/ first on the path: no file or folder there may hide a package."""
    done = subprocess.run(
        [sys.executable, f"data_prep/{command}.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python data_prep/{command}.py ")


def test_a_stats_file_that_says_nothing_stops_no_tar(shape_tars: Path, tmp_path: Path, capsys) -> None:
    shutil.copy(shape_tars / "00000.tar", tmp_path)
    (tmp_path / "00000_stats.json").write_text("{}")
    assert encode(str(tmp_path), tmp_path / "data", "--resolutions", "64") == 0
    assert "states no count `successes`" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["index.json.tar", "...tar", "\udcff.tar"])
def test_a_tar_whose_name_no_folder_can_have(shape_tars: Path, tmp_path: Path, capsys, name: str) -> None:
    shutil.copy(shape_tars / "00000.tar", tmp_path / name)
    assert encode(str(tmp_path / name), tmp_path / "data", "--resolutions", "64") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("which no folder can be called; rename it")


def test_tars_of_which_one_name_begins_like_another(shape_tars: Path, tmp_path: Path) -> None:
    for name, tar in (("a.tar", "00000.tar"), ("a.b.tar", "00001.tar"), ("[a].tar", "00000.tar")):
        shutil.copy(shape_tars / tar, tmp_path / name)
    root = tmp_path / "data"
    assert encode(str(tmp_path / "*.tar"), root, "--resolutions", "64") == 0
    assert whole_parts(root) == ["images/[a]", "images/a", "images/a.b"]
    assert schema.Card.load(root).counts["written"] == 30
