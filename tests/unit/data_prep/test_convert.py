"""A data set in other formats: every row is read back by the library of the format, and compared with the MDS shards'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import webdataset
from pyarrow import parquet
from streaming import StreamingDataset

from data_prep import encode, schema
from data_prep.convert import main


@pytest.fixture(scope="module")
def eight_bits(shape_tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compressed shards with text in int8, by aspect ratio."""
    root = tmp_path_factory.mktemp("eight") / "data"
    words = ["--input", f"{shape_tars}/00000.tar", "--output", str(root), "--encoders", "tiny", "--decoders", "1"]
    assert (
        encode.main([*words, "--resolutions", "256", "--buckets", "--text-dtype", "int8", "--compression", "zstd"]) == 0
    )
    return root


def stored(root: Path, set_: str, cache: Path) -> list[dict[str, Any]]:
    """The rows of a set as streaming reads them."""
    return list(StreamingDataset(remote=str(root / set_), local=str(cache), shuffle=False, batch_size=1))


def read(out: Path, to: str) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """The rows of a folder's files, as docs/data.md reads them."""
    rows = []
    if to == "webdataset":
        for sample in webdataset.WebDataset([str(path) for path in sorted(out.glob("*.tar"))], shardshuffle=False):
            rows.append((json.loads(sample["json"]), safetensors.torch.load(sample["safetensors"])))
    else:
        for path in sorted(out.glob("*.parquet")):
            for row in parquet.read_table(path).to_pylist():
                tensors = safetensors.torch.load(row.pop("tensors"))
                rows.append((row, tensors))
    return rows


@pytest.mark.parametrize("to", ["webdataset", "parquet"])
@pytest.mark.parametrize("kind", ["data_set", "eight_bits"])
def test_every_row_is_read_back(request, tmp_path, capsys, to, kind):
    root: Path = request.getfixturevalue(kind)
    card, out = schema.Card.load(root), tmp_path / "out"
    assert main([str(root), "--to", to, "--output", str(out)]) == 0
    total = int(capsys.readouterr().out.splitlines()[-1].split(" samples in ")[0])
    assert total == card.counts["written"] == sum(about["samples"] for about in card.sets.values())
    for n, set_ in enumerate(card.sets):
        expected, got = stored(root, set_, tmp_path / f"cache{n}"), read(out / set_, to)
        assert len(got) == len(expected) > 0
        for row, (about, tensors) in zip(expected, got, strict=True):
            assert about == {name: row[name] for name in ("key", "caption", "width", "height")}
            arrays = {name: value for name, value in row.items() if name not in (*about, "crc32")}
            assert tensors.keys() == arrays.keys()
            for name, value in arrays.items():
                if name != "text":
                    assert tensors[name].numpy().tobytes() == value.tobytes()
            kind_of_text = torch.bfloat16 if card.text_dtype == "bfloat16" else torch.int8
            assert tensors["text"].dtype == kind_of_text
            text = (
                tensors["text"].float() * tensors["text_scale"][:, None] if "text_scale" in tensors else tensors["text"]
            )
            assert torch.equal(text.bfloat16(), schema.text_of(row, card.text_dtype))
    assert schema.Card.load(out).fingerprint == card.fingerprint
    assert torch.equal(schema.load_null_text(out), schema.load_null_text(root))


def test_started_again_it_makes_what_is_missing(data_set, tmp_path):
    out = tmp_path / "out"
    words = [str(data_set), "--to", "webdataset", "--output", str(out)]
    assert main(words) == 0
    first, *others = sorted(out.rglob("*.tar"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (first, *others)}
    first.unlink()
    assert main(words) == 0
    assert first.read_bytes() == before[first][1], "the same bytes"
    assert all(path.stat().st_mtime_ns == before[path][0] for path in others)


@pytest.mark.parametrize(
    "damage", ["bit", "cut", "missing", "no data set", "not finished", "another data set", "a file"]
)
def test_what_cannot_be_converted_is_one_line(data_set, tmp_path, capsys, damage):
    root, out = Path(shutil.copytree(data_set, tmp_path / "data")), tmp_path / "out"
    shard = next(iter(sorted(root.rglob("*.mds"))))
    name = str(shard.relative_to(root))
    content = shard.read_bytes()
    if damage == "bit":
        shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        shard.unlink()
    elif damage == "no data set":
        (root / schema.CARD).unlink()
    elif damage == "not finished":
        card = schema.Card.load(root)
        card.complete = False
        card.save(root)
    else:
        out.mkdir()
        (out / (schema.CARD if damage == "another data set" else "notes.txt")).write_text("{}")
    assert main([str(root), "--to", "parquet", "--output", str(out)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("convert: ")]
    expected = {
        "no data set": "is no data set: it has no dataset.json",
        "not finished": "is not finished",
        "another data set": "holds no conversion of this data set",
        "a file": "holds no conversion of this data set",
    }
    assert expected.get(damage, name) in line
    assert not list(out.rglob("*.parquet")) or damage in ("bit", "cut", "missing")
    assert not [path for path in out.rglob("*") if path.name.startswith(".")], "nothing half-written is left"
