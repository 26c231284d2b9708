"""Verify on real data sets: each damage is one line that names it, and after a repair the bytes are the same again."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from safetensors.torch import save_file
from streaming import MDSWriter
from support import ROOT

from data_prep import encode, schema
from data_prep.common import mds, storage
from data_prep.shapes import check, scenes
from data_prep.verify import main
from data_prep.worker import commands, report
from data_prep.worker.parts import finish_data_set

Rows = list[dict[str, Any]]
NAN = float("nan")


def encoded(tars: str, output: Path | str, *more: str) -> None:
    assert encode.main(["--input", tars, "--output", str(output), "--encoders", "tiny", "--decoders", "1", *more]) == 0


@pytest.fixture(scope="module")
def packed(shape_tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with aspect-ratio buckets, text in int8 and compressed shards, of two commands."""
    root = tmp_path_factory.mktemp("packed") / "data"
    for tar in ("00001", "00000"):
        options = ("--resolutions", "256", "--buckets", "--text-dtype", "int8", "--compression", "zstd:3")
        encoded(f"{shape_tars}/{tar}.tar", root, *options)
    return root


@pytest.fixture
def copied(data_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_set, tmp_path / "data"))


@pytest.fixture
def copied_packed(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "packed"))


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Runs the command; returns the damages it tells, without their mends."""

    def run(root: Path | str, *more: str) -> list[str]:
        capsys.readouterr()
        code = main([str(root), "--workers", "2", *more])
        said = capsys.readouterr()
        assert not said.err
        lines = said.out.splitlines()
        damages = [line.removeprefix("damaged: ") for line in lines if line.startswith("damaged: ")]
        assert code == (1 if damages else 0)
        assert lines[-1] == (f"damages: {len(damages)}" if damages else "whole")
        assert all("; --repair " in damage for damage in damages)
        return [damage.partition("; --repair ")[0] for damage in damages]

    return run


def contents(root: Path) -> dict[str, bytes]:
    """All files of a data set."""
    names = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith("work/")}


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def flip(path: Path, at: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def drop_line(path: Path) -> None:
    path.write_text('{"tar": "a.tar", "key": "a", "reason": "no_image", "detail": ""}\n')


def change_set_index(path: Path) -> None:
    index = json.loads(path.read_text())
    index["shards"].reverse()
    path.write_text(json.dumps(index))


def save_text(path: Path, values: torch.Tensor) -> None:
    save_file({"text": values.bfloat16()}, path)


SHARD, PART_INDEX = "images/256-512/00001/shard.00000.mds", "images/256-512/00001/index.json"
SET_INDEX, PART = "images/256-512/index.json", "reports/images/00001.json"
DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "one bit": (SHARD, flip, "its sha256 is not the one in its index"),
    "cut shard": (SHARD, cut, "bytes, its index says"),
    "no shard": (SHARD, Path.unlink, "is missing"),
    "no part index": (PART_INDEX, Path.unlink, "is missing"),
    "cut part index": (PART_INDEX, cut, "is no JSON"),
    "odd part index": (PART_INDEX, lambda p: replace(p, '"bytes": ', '"octets": '), "is no index of shards (KeyError"),
    "no part report": (PART, Path.unlink, "is missing"),
    "cut part report": (PART, cut, "is no JSON"),
    "odd part report": (PART, lambda p: p.write_text("[]"), "is no part's report"),
    "part report's sum": (
        PART,
        lambda p: replace(p, '"read": 10', '"read": 11'),
        "read 11 is not written 10 + dropped 0",
    ),
    "part report's bytes": (PART, lambda p: replace(p, '"crc32": ', '"crc32": 1'), "column_bytes.crc32 is 1"),
    "part report's set": (PART, lambda p: replace(p, "   256\n", "   512\n"), "its set 256"),
    "rejects": (
        f"{PART}l",
        drop_line,
        "its 1 lines are not the 0 dropped (dropped.no_image is 1, the parts give null)",
    ),
    "no rejects": (f"{PART}l", Path.unlink, "is missing"),
    "set index": (SET_INDEX, change_set_index, "is not what the indexes of its parts give"),
    "cut set index": (SET_INDEX, cut, "is no JSON"),
    "card": (schema.CARD, lambda p: replace(p, '"token_cap": 300', '"token_cap": 301'), "is damaged, was changed"),
    "no card": (schema.CARD, Path.unlink, "is missing"),
    "card's counts": (schema.CARD, lambda p: replace(p, '"written": 20', '"written": 21'), "counts.written is 21, the"),
    "card's sets": (schema.CARD, lambda p: replace(p, '"shards": 2', '"shards": 3'), "shards is 3, the parts give 2"),
    "unfinished": (schema.CARD, lambda p: replace(p, '"complete": true', '"complete": false'), "is not finished"),
    "no null text": (schema.NULL_TEXT, Path.unlink, "is missing"),
    "cut null text": (schema.NULL_TEXT, cut, "cannot be read"),
    "null text's shape": (
        schema.NULL_TEXT,
        lambda p: save_text(p, torch.zeros(1, 64)),
        "is [1, 64], expected",
    ),
    "null text's values": (
        schema.NULL_TEXT,
        lambda p: save_text(p, torch.full((1, 128), NAN)),
        "not finite",
    ),
    "report": ("report.json", lambda p: replace(p, '"read": 20', '"read": 21'), "read is 21, the parts give 20"),
    "report for people": ("report.txt", lambda p: replace(p, "read 20", "read 21"), "is not what the parts give"),
    "picture": ("report_sizes.png", cut, "is no picture"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_one_line(name: str, copied: Path, verify: Callable[..., list[str]]) -> None:
    file, damage, words = DAMAGES[name]
    damage(copied / file)
    (line,) = verify(copied)
    assert words in line
    assert line.startswith(f"{file}: ")


def test_a_repair_gives_the_same_bytes(
    data_set: Path, copied: Path, verify: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two parts one is damaged, and much of what follows from both; the other one is not touched."""
    assert verify(copied) == []
    untouched = {p: p.stat().st_ino for p in copied.glob("images/*/00000/*")}
    lost = "images/256/00001/shard.00000.mds"
    (copied / lost).unlink()
    together = ("one bit", "set index", "card's counts", "no null text", "report", "report for people", "picture")
    for file, damage, _ in (DAMAGES[name] for name in together):
        damage(copied / file)
    assert {line.split(":")[0] for line in verify(copied)} == {lost, *(DAMAGES[name][0] for name in together)}
    assert main([str(copied), "--repair"]) == 0
    said = capsys.readouterr().out
    assert "--repair makes images/00001 again" in said and "python data_prep/encode.py '--input=" in said
    assert "2 tars, 1 of them already encoded" in said and said.splitlines()[-1] == "whole"
    assert contents(copied) == contents(data_set)
    assert {p: p.stat().st_ino for p in copied.glob("images/*/00000/*")} == untouched


def test_a_repair_of_everything(packed: Path, copied_packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a card, samples cannot be judged: what is damaged in them is seen, and made again, once there is one."""
    root, part = copied_packed, "images/256_16x16/00000"
    rewrite(root, part, lambda rows: rows[3].update(key="images/00001/000000003"))
    cut(root / PART)
    cut(root / schema.CARD)
    assert main([str(root), "--repair"]) == 0
    said = capsys.readouterr().out
    key = "images/00001/000000003: its key does not start with images/00000/"
    assert f"{part}/shard.00000.mds.zstd: 1 of its 10 samples are damaged; the first is {key}" in said
    assert said.splitlines()[-1] == "whole"
    assert contents(root) == contents(packed)


# ---- content that sizes and hashes do not give away ----


def rewrite(
    root: Path, folder: str, change: Callable[[Rows], Any], limit: int = 1 << 27, seal: bool = True, **columns: str
) -> None:
    """Writes a part's shard anew after a change of its rows, and all indexes, with sizes and hashes as they are then."""
    card, part = schema.Card.load(root), root / folder
    (shard,) = json.loads((part / schema.INDEX).read_text())["shards"]
    file = part / (shard["zip_data"] or shard["raw_data"])["basename"]
    there = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    rows = [
        {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in row.items()}
        for row in mds.decode_rows(mds.decompressed(file.read_bytes(), shard), shard, there)
    ]
    change(rows)
    shutil.rmtree(part)
    options = {"hashes": ["sha256"], "size_limit": limit, "compression": shard["compression"]}
    with MDSWriter(out=str(part), columns={**there, **columns}, **options) as writer:
        for row in rows:
            writer.write(mds.with_checksum(row, writer.encode_sample) if seal else row)
    finish_data_set(root, card, card.counts)


def put(column: str, value: float, dtype: Any = None) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        values = rows[2][column] if dtype is None else rows[2][column].view(dtype)
        values.flat[5] = value

    return change


def shaped(column: str, to: Callable[[np.ndarray], np.ndarray]) -> Callable[[Rows], None]:
    return lambda rows: rows[2].update({column: to(rows[2][column])})


CONTENTS: dict[str, tuple[Callable[[Rows], Any], str]] = {
    "rewritten only": (lambda rows: None, ""),
    "NaN in text": (put("text", 0x7FC0), "text is not finite"),
    "infinity in text": (put("text", 0xFF80), "text is not finite"),
    "NaN in a mean": (put("latent_256_mean", NAN), "latent_256_mean is not finite"),
    "infinity in a mean": (put("latent_512_mean", np.inf), "latent_512_mean is not finite"),
    "NaN in a std": (put("latent_512_std", NAN), "latent_512_std is not finite"),
    "std below 0": (put("latent_256_std", -1e-3), "latent_256_std is below 0"),
    "another shape": (
        shaped("latent_512_mean", lambda v: v[:, :32]),
        "latent_512_mean is (4, 32, 64), expected (4, 64",
    ),
    "flat latent": (shaped("latent_256_std", np.ravel), "latent_256_std is (4096,), expected (4, 32, 32)"),
    "flat text": (shaped("text", np.ravel), "expected (1 to 300, 128)"),
    "long text": (shaped("text", lambda v: np.repeat(v[:1], 301, 0)), "text is (301, 128), expected (1 to 300, 128)"),
    "narrow text": (shaped("text", lambda v: v[:, :64]), "64), expected (1 to 300, 128)"),
    "another part's key": (
        lambda rows: rows[2].update(key="images/00002/x"),
        "its key does not start with images/00001/",
    ),
    "a key twice": (lambda rows: rows[2].update(key=rows[1]["key"]), "its key occurs twice"),
    "no caption": (lambda rows: rows[2].update(caption=" "), "its caption is empty"),
    "small picture": (lambda rows: rows[2].update(width=511), "its picture of 511 × 512 pixels belongs to another set"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_damaged_samples(name: str, copied: Path, verify: Callable[..., list[str]]) -> None:
    change, words = CONTENTS[name]
    rewrite(copied, "images/256-512/00001", change)
    damages = verify(copied)
    if not words:
        assert damages == []
        return
    assert len(damages) == 1 and words in damages[0]
    assert damages[0].startswith(f"{SHARD}: 1 of its 6 samples are damaged; the first is images/")


def test_a_sample_that_does_not_match_its_checksum(copied: Path, verify: Callable[..., list[str]]) -> None:
    """Changed before its shard was hashed."""
    rewrite(copied, "images/256-512/00001", lambda rows: rows[2].update(caption="another"), seal=False)
    (line,) = verify(copied)
    assert line.startswith(f"{SHARD}: sample 2 cannot be decoded (ValueError: its crc32 is not that of its bytes)")


def test_a_lost_sample_and_other_columns(copied: Path, verify: Callable[..., list[str]]) -> None:
    rewrite(copied, "images/256/00001", lambda rows: rows.pop())
    (line,) = verify(copied)
    assert line == f"{PART}: written.256 is 4, the parts give 3"

    def widen(rows: Rows) -> None:
        for row in rows:
            row["latent_256_mean"] = row["latent_256_mean"].astype(np.float32)

    rewrite(copied, "images/256/00000", widen, latent_256_mean="ndarray:float32")
    line = verify(copied)[0]
    assert line.startswith("images/256/00000/shard.00000.mds: has other columns than the card's") and "float32" in line


def test_several_shards(copied: Path, verify: Callable[..., list[str]]) -> None:
    folder = copied / "images/256-512/00001"
    rewrite(copied, "images/256-512/00001", lambda rows: None, limit=200_000)
    assert len(list(folder.glob("*.mds"))) == 3
    (line,) = verify(copied)
    assert line.startswith(f"{PART}: stored_bytes is ")
    content = json.loads((copied / PART).read_text())
    content["stored_bytes"] = sum(p.stat().st_size for p in copied.glob("images/*/00001/*.mds"))
    (copied / PART).write_text(json.dumps(content))
    card = schema.Card.load(copied)
    finish_data_set(copied, card, report.card_counts(report.write_reports(copied, card)))
    assert verify(copied) == []
    flip(folder / "shard.00001.mds")
    (folder / "shard.00002.mds").unlink()
    assert [line.split(":")[0].rpartition("/")[2] for line in verify(copied)] == ["shard.00001.mds", "shard.00002.mds"]


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_nothing_is_unpickled(
    copied: Path, tmp_path: Path, verify: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    sprung.unlink()

    def trap(rows: Rows) -> None:
        for row in rows:
            row["caption"] = Trap(sprung)

    rewrite(copied, "images/256/00000", trap, caption="pkl")
    assert "has other columns than the card's" in verify(copied)[0]
    assert main([str(copied), "--sample", "20", "--out", str(tmp_path / "x.png")]) == 2
    assert "has other columns than the card's" in capsys.readouterr().err
    assert not sprung.exists()


# ---- compressed and 8-bit sets ----


def test_compressed_shards(copied_packed: Path, verify: Callable[..., list[str]]) -> None:
    """streaming unpacks a shard beside the compressed one, and reads that from then on: it is checked, too."""
    folder = "images/256_16x16/00001"
    index = json.loads((copied_packed / folder / schema.INDEX).read_text())["shards"][0]
    file, unpacked = copied_packed / folder / "shard.00000.mds.zstd", copied_packed / folder / "shard.00000.mds"
    assert verify(copied_packed) == []
    unpacked.write_bytes(mds.decompressed(file.read_bytes(), index))
    assert verify(copied_packed) == []
    flip(unpacked)
    flip(copied_packed / "images/256_16x16/00000/shard.00000.mds.zstd")
    names = [f"{folder[:-1]}0/shard.00000.mds.zstd", f"{folder}/shard.00000.mds"]
    assert verify(copied_packed) == [f"{name}: its sha256 is not the one in its index" for name in names]


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("text_scale", NAN, "text_scale is not above 0"),
        ("text_scale", 0.0, "text_scale is not above 0"),
        ("text_scale", np.inf, "text is not finite"),
        ("latent_256_std", NAN, "latent_256_std is not finite"),
    ],
)
def test_damaged_packed_samples(
    column: str, value: float, words: str, copied_packed: Path, verify: Callable[..., list[str]]
) -> None:
    rewrite(copied_packed, "images/256_16x16/00001", put(column, value))
    (line,) = verify(copied_packed)
    assert "shard.00000.mds.zstd: 1 of its 10 samples" in line and words in line


def test_8_bit_floats_and_means_alone(shape_tars: Path, tmp_path: Path, verify: Callable[..., list[str]]) -> None:
    options = (
        "--resolutions",
        "512",
        "--posterior",
        "mean",
        "--text-dtype",
        "float8_e4m3fn",
        "--long-captions",
        "drop",
    )
    root = tmp_path / "data"
    encoded(f"{shape_tars}/00000.tar", root, *options, "--token-cap", "12")
    assert json.loads((root / "report.json").read_text())["dropped"].keys() == {"too_small", "caption_too_long"}
    assert verify(root) == []
    rewrite(root, "images/512/00000", put("text", 0x7F))
    assert "text is not finite" in verify(root)[0]


# ---- what is missing, what is left over, what cannot be made again ----


def test_strays_are_warned_of(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "images/256/00001/notes.txt").write_text("mine")
    shutil.copytree(copied / "images/256/00000", copied / "images/256/00007")
    shutil.copytree(copied / "images/256", copied / "work/images.00009.dead")
    (copied / ".tmp-x").write_text("")
    assert main([str(copied)]) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.split(": ")[1] for line in warned] == ["./", "images/256/00001/", "images/256/00007/"]
    assert "2 files" in warned[2]


def test_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert "none is no data set" in capsys.readouterr().err


def test_repair_without_a_command(
    packed: Path, copied_packed: Path, shape_tars: Path, verify: Callable[..., list[str]], capsys
) -> None:
    """It takes the damage out and says what to do; then the part is missing, as report.json tells."""
    flip(copied_packed / "images/256_16x16/00001/shard.00000.mds.zstd")
    shutil.rmtree(copied_packed / "work")
    assert main([str(copied_packed), "--repair"]) == 2
    assert "1 damaged parts were taken out: run encode.py on it again by hand" in capsys.readouterr().err
    assert verify(copied_packed) == [f"{PART}: is missing"]
    options = ("--resolutions", "256", "--buckets", "--text-dtype", "int8", "--compression", "zstd:3")
    encoded(f"{shape_tars}/*.tar", copied_packed, *options)
    assert verify(copied_packed) == []
    assert contents(copied_packed) == contents(packed)


def test_nothing_is_removed_that_cannot_be_made_again(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tar of a damaged part is gone; or another one has its name."""
    flip(copied / SHARD)
    before = contents(copied)
    (command,) = (copied / commands.FOLDER).glob("*.json")
    content = json.loads(command.read_text())
    place = Path(content["arguments"][0].removeprefix("--input=")).parent
    tars = copied.parent / "tars"
    shutil.copytree(place, tars)
    content["arguments"][0] = f"--input={tars}/*.tar"
    command.write_text(json.dumps(content))
    for damage, words in (
        (lambda tar: tar.write_bytes(b"tar"), "has 3 bytes, images/00001 was made of"),
        (Path.unlink, "no tar is found any more for images/00001"),
    ):
        damage(tars / "00001.tar")
        assert main([str(copied), "--repair"]) == 2
        assert (
            "nothing was removed, as it cannot be made again: " in (said := capsys.readouterr().err) and words in said
        )
        assert contents(copied) == before


# ---- object storage ----


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, bytes]]:
    """fsspec's file system in memory, as s3://; returns what is in it."""
    memory = MemoryFileSystem(global_store=False, skip_instance_cache=True)
    monkeypatch.setattr(storage, "file_system", lambda url: (memory, f"/{url.removeprefix('s3://')}"))
    return lambda: {name: memory.cat(name) for name in memory.find("/bucket")}


def test_object_storage(
    packed: Path,
    shape_tars: Path,
    bucket: Callable[[], dict[str, bytes]],
    tmp_path: Path,
    verify: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    url, work = "s3://bucket/data", tmp_path / "work"
    options = (
        "--resolutions",
        "256",
        "--buckets",
        "--text-dtype",
        "int8",
        "--compression",
        "zstd:3",
        "--work",
        str(work),
    )
    encoded(f"{shape_tars}/*.tar", url, *options)
    whole = bucket()
    assert {name.removeprefix("/bucket/data/"): data for name, data in whole.items()} == contents(packed)
    assert verify(url) == []
    fs, root = storage.file_system(url)
    shard, card = f"{root}/images/256_16x16/00001/shard.00000.mds.zstd", f"{root}/{schema.CARD}"
    fs.pipe_file(shard, whole[shard][:-3])
    fs.pipe_file(card, whole[card].replace(b'"written": 20', b'"written": 21'))
    fs.rm(f"{root}/{schema.NULL_TEXT}")
    assert len(verify(url)) == 3
    assert main([str(work)]) == 2
    assert f"run verify.py {url} --work {work}" in capsys.readouterr().err
    assert main([url, "--work", str(work), "--repair"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "whole"
    assert bucket() == whole
    assert main([url, "--sample", "2", "--out", str(tmp_path / "x.png")]) == 0
    assert list((tmp_path / "tmp").iterdir()) == []


# ---- pictures ----


@pytest.mark.usefixtures("one_thread")
def test_sample(data_set: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is decoded shows what its caption says; the seed decides which they are."""
    told = {}
    for root, name, *options in (
        (packed, "all", "50", "--seed", "1"),
        (packed, "a", "2", "--seed", "1"),
        (packed, "b", "2", "--seed", "1"),
        (packed, "c", "2", "--seed", "2"),
        (data_set, "large", "2"),
    ):
        assert main([str(root), "--out", str(tmp_path / f"{name}.png"), "--sample", *options]) == 0
        told[name] = capsys.readouterr().out.splitlines()[:-1]
    assert told["a"] == told["b"] != told["c"] and len(set(told["a"])) == 2 and len(set(told["all"])) == 20
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    world = list(scenes(20, seed=5))
    for name, columns, rows in (("all", 5, 4), ("large", 2, 1)):
        picture = Image.open(tmp_path / f"{name}.png")
        assert picture.width == 8 + columns * 264
        for n, key in enumerate(told[name]):
            left, top = 8 + n % columns * 264, 8 + n // columns * ((picture.height - 8) // rows)
            verdict = check(picture.crop((left, top, left + 256, top + 256)), world[int(key.rpartition("/")[2])])
            assert verdict.background and verdict.foreground, key


def test_another_vae_is_refused(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = schema.Card.load(copied)
    card.vae["fingerprint"] = "0" * 64
    card.save(copied)
    assert main([str(copied), "--sample", "2", "--out", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert (
        "tiny_vae is not the one that encoded the data set: its fingerprint is " in error and "expected 0000" in error
    )
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("options", ["--workers 0", "--sample 0", "--repair --sample 2", "--repair --work x"])
def test_options(options: str) -> None:
    with pytest.raises(SystemExit):
        main(["data", *options.split()])


def test_it_runs_as_a_script(copied: Path) -> None:
    """`python data_prep/verify.py` puts data_prep/ itself first on the path: no module there may hide a package."""
    flip(copied / SHARD)
    command = [sys.executable, "data_prep/verify.py", str(copied)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"damaged: {SHARD}: its sha256" in done.stdout
