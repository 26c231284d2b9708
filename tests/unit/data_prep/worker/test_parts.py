"""Parts: written whole or not at all, compressed, removed, and joined under one index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from encoding import encode, report, rows
from streaming import StreamingDataset

from data_prep import schema


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
