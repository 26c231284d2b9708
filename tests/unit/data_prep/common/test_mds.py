"""MDS as bytes against streaming's own writer and reader, and bytes that have changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter, StreamingDataset

from data_prep.common import mds

COLUMNS = {"key": "str", "values": "ndarray:float16", "size": "int", mds.CRC: mds.CRC_ENCODING}
ROWS: list[dict[str, Any]] = [
    {"key": f"k{n}" * (n + 1), "values": np.arange(n + 1, dtype=np.float16), "size": n} for n in range(5)
]


def shard(folder: Path, compression: str | None = None) -> tuple[bytes, dict[str, Any]]:
    """A shard's file and its entry in the index."""
    with MDSWriter(out=str(folder), columns=COLUMNS, hashes=["sha256"], compression=compression) as writer:
        for row in ROWS:
            writer.write(mds.with_checksum(row, writer.encode_sample))
    (entry,) = json.loads((folder / "index.json").read_text())["shards"]
    return (folder / (entry["zip_data"] or entry["raw_data"])["basename"]).read_bytes(), entry


@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_rows_are_those_that_streaming_reads(tmp_path: Path, compression: str | None) -> None:
    stored, entry = shard(tmp_path / "shards", compression)
    raw = mds.decompressed(stored, entry)
    assert len(raw) == entry["raw_data"]["bytes"]
    theirs = StreamingDataset(local=str(tmp_path / "shards"), batch_size=1, shuffle=False)
    for ours, row, written in zip(mds.decode_rows(raw, entry, COLUMNS), theirs, ROWS, strict=True):
        assert ours.keys() == row.keys()
        for column in written:
            np.testing.assert_array_equal(ours[column], row[column])
            np.testing.assert_array_equal(ours[column], written[column])


def test_every_changed_byte_of_a_sample_is_noticed(tmp_path: Path) -> None:
    raw, entry = shard(tmp_path)
    first = int(np.frombuffer(raw, "<u4", 2)[1])
    assert len(list(mds.decode_rows(raw, entry, COLUMNS))) == len(ROWS)
    for at in range(first, len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1
        with pytest.raises(ValueError, match=r"sample \d cannot be decoded"):
            list(mds.decode_rows(bytes(changed), entry, COLUMNS))


def test_other_columns_and_samples_at_impossible_places(tmp_path: Path) -> None:
    raw, entry = shard(tmp_path)
    for damaged, columns, words in (
        (raw, {**COLUMNS, "key": "pkl"}, "has other columns than the card's"),
        (raw[:-1], COLUMNS, "has samples at impossible places"),
        (b"", COLUMNS, "does not hold the 5 samples of its index"),
        (b"\x06" + raw[1:], COLUMNS, "does not hold the 5 samples of its index"),
    ):
        with pytest.raises(ValueError, match=words):
            list(mds.decode_rows(damaged, entry, columns))


def test_what_cannot_be_decompressed(tmp_path: Path) -> None:
    stored, entry = shard(tmp_path, "zstd:3")
    with pytest.raises(ValueError, match="cannot be decompressed"):
        mds.decompressed(b"x" + stored[1:], entry)
