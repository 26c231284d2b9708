"""Parts: written whole or not at all, compressed, removed, and joined under one index."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoding import CARD, encode, report, rows, write_part
from streaming import StreamingDataset

from data_prep import schema
from data_prep.worker.parts import (
    PartWriter,
    finish_data_set,
    read_part_report,
    remove_leftovers,
    remove_part,
    whole_parts,
)


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


def test_nothing_shows_before_the_commit_or_after_an_error(tmp_path: Path) -> None:
    record = schema.Record(
        "a/0/x", "c", torch.ones(1, 16).bfloat16(), {64: schema.Latent(*torch.ones(2, 4, 8, 8))}, 64, 64
    )
    with suppress(InterruptedError), PartWriter(tmp_path, "a/0", CARD, "token") as part:
        part.write(record)
        assert part.finish() > 0
        assert {p.name for p in tmp_path.iterdir()} == {schema.WORK}
        raise InterruptedError
    assert not [p for p in tmp_path.rglob("*") if p.is_file()] and whole_parts(tmp_path) == []


def test_the_second_of_two_writers_finds_its_folder_in_place(tmp_path: Path) -> None:
    write_part(tmp_path, "a/0", 3)
    shard = tmp_path / "a" / "64" / "0" / "shard.00000.mds"
    before = shard.stat().st_ino, shard.read_bytes()
    write_part(tmp_path, "a/0", 3, token="other")
    assert (shard.stat().st_ino, shard.read_bytes()) == before
    shard.write_bytes(b"damaged")
    write_part(tmp_path, "a/0", 3)
    assert shard.read_bytes() == before[1]
    assert not (tmp_path / schema.WORK / "parts" / "a" / "0").exists()


def test_parts_are_listed_joined_and_removed(tmp_path: Path) -> None:
    for name, count in (("a/[1]", 2), ("b/0", 1), ("a/0", 3)):
        write_part(tmp_path, name, count)
    assert whole_parts(tmp_path) == ["a/0", "a/[1]", "b/0"]
    card = finish_data_set(tmp_path, replace(CARD), {"read": 6})
    assert card.complete and schema.Card.load(tmp_path) == card
    assert {name: (s["samples"], s["shards"]) for name, s in card.sets.items()} == {"a/64": (5, 2), "b/64": (1, 1)}
    found = StreamingDataset(local=str(tmp_path / "a" / "64"), batch_size=1, shuffle=False)
    assert [row["key"] for row in found] == ["a/0/0", "a/0/1", "a/0/2", "a/[1]/0", "a/[1]/1"]
    remove_part(tmp_path, "a/[1]")
    assert whole_parts(tmp_path) == ["a/0", "b/0"] and not (tmp_path / "a" / "64" / "[1]").exists()
    assert finish_data_set(tmp_path, card, {}).sets["a/64"]["samples"] == 3


def test_a_report_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    write_part(tmp_path, "a/0", 1)
    report_ = read_part_report(tmp_path, "a/0")
    assert report_ is not None and report_["written"] == {"64": 1}
    assert (tmp_path / "reports" / "a" / "0.jsonl").read_text() == '{"key": "x", "reason": "é"}\n'
    assert read_part_report(tmp_path, "a/1") is None
    (tmp_path / "reports" / "a" / "0.json").write_text("{")
    with pytest.raises(ValueError, match=r"0\.json is damaged .* and the part is made again"):
        read_part_report(tmp_path, "a/0")


def test_leftovers_of_whole_parts_alone_are_removed(tmp_path: Path) -> None:
    for name in ("a/0", "a/1"):
        (tmp_path / schema.WORK / "parts" / name / "dead").mkdir(parents=True)
    remove_leftovers(tmp_path, {"a/0"})
    assert [p.name for p in (tmp_path / schema.WORK / "parts" / "a").iterdir()] == ["1"]
