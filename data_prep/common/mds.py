"""MDS as bytes: a shard's rows, and the checksum that each stored sample carries.

The column `crc32` is the CRC-32 of the sample's bytes as they are stored, its own four taken as zero. It covers the sizes in
front of the columns, too; so a sample of other bytes than were written is noticed wherever it is read, without its shard's
sha256.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from streaming.base.compression import decompress
from streaming.base.format.mds.encodings import mds_decode
from streaming.base.format.mds.reader import MDSReader

CRC = "crc32"
CRC_ENCODING = "uint32"


def sealed(row: dict[str, Any], encode: Callable[[dict[str, Any]], bytes]) -> dict[str, Any]:
    """The row with its checksum; `encode` gives a row's bytes as they will be stored."""
    return {**row, CRC: np.uint32(zlib.crc32(encode({**row, CRC: 0})))}


def decode(reader: MDSReader, data: memoryview) -> dict[str, Any]:
    """A sample's columns, arrays being views of `data`. Raises ValueError where it is not what was written."""
    at = 4 * sum(size is None for size in reader.column_sizes)
    if len(data) < at:
        raise ValueError(f"its {len(data)} bytes do not even hold the sizes of its columns")
    stored = iter(struct.unpack_from(f"<{at // 4}I", data))
    values: dict[str, tuple[str, memoryview]] = {}
    crc = 0
    for name, encoding, size in zip(reader.column_names, reader.column_encodings, reader.column_sizes, strict=True):
        start, at = at, at + (next(stored) if size is None else size)
        values[name] = encoding, data[start:at]
        if name == CRC:
            crc = zlib.crc32(data[at:], zlib.crc32(bytes(4), zlib.crc32(data[:start])))
    if at != len(data) or crc != int.from_bytes(values[CRC][1], "little"):
        raise ValueError(f"its {CRC} is not that of its bytes")
    return {
        name: mds_decode(encoding, bytes(value) if encoding == "str" else value)  # type: ignore[arg-type]
        for name, (encoding, value) in values.items()
    }


def unpacked(stored: bytes, shard: dict[str, Any]) -> bytes:
    """The uncompressed bytes of a shard's file; `shard` is its entry in an index. Raises ValueError where it is damaged."""
    if shard["zip_data"] is None:
        return stored
    try:
        return decompress(shard["compression"], stored)
    except Exception as error:  # each method of compression raises its own kind
        raise ValueError(f"cannot be decompressed ({error})") from error


def rows_of(raw: bytes, shard: dict[str, Any], expected: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of a shard's uncompressed bytes; `shard` is its entry in an index, `expected` are the columns by the card.

    Raises ValueError where they are damaged. Other columns are not decoded: MDS would unpickle where an index asks for it.
    """
    there = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    if there != expected:
        raise ValueError(f"has other columns than the card's: {sorted(there.items() ^ expected.items())}")
    places = np.frombuffer(raw, "<u4", min(len(raw) // 4, shard["samples"] + 2))
    if len(places) < 2 or places[0] != shard["samples"] or len(places) != places[0] + 2:
        raise ValueError(f"does not hold the {shard['samples']} samples of its index")
    if places[-1] != len(raw) or (np.diff(places[1:].astype(np.int64)) <= 0).any():
        raise ValueError("has samples at impossible places")
    at = 0
    try:
        reader, data = MDSReader.from_json("", None, shard), memoryview(raw)
        for at, (start, end) in enumerate(pairwise(places[1:].tolist())):  # noqa: B007 (for the message)
            yield decode(reader, data[start:end])
    except Exception as error:  # MDS promises no set of exceptions for damaged data
        raise ValueError(f"sample {at} cannot be decoded ({type(error).__name__}: {error})") from error
