"""MDS shards as bytes: decompression, rows, and the checksum that each stored sample carries.

The column `crc32` is the CRC-32 of the sample's bytes as they are stored, with zeros for its own four. It covers the sizes in
front of the columns, too; so a sample whose bytes have changed is noticed wherever it is read, without its shard's sha256.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

# streaming is imported where shards are read: it takes seconds, and cards and reports need none of it.
if TYPE_CHECKING:
    from streaming.base.format.mds.reader import MDSReader

CRC = "crc32"
CRC_ENCODING = "uint32"


def with_checksum(row: dict[str, Any], encode: Callable[[dict[str, Any]], bytes]) -> dict[str, Any]:
    """Returns the row with its checksum; `encode` gives a row's bytes as they will be stored."""
    return {**row, CRC: np.uint32(zlib.crc32(encode({**row, CRC: 0})))}


def decode_sample(reader: MDSReader, data: memoryview) -> dict[str, Any]:
    """Returns a sample's columns; arrays are views of `data`. Raises ValueError where the bytes have changed since."""
    from streaming.base.format.mds.encodings import mds_decode

    offset = 4 * sum(size is None for size in reader.column_sizes)
    if len(data) < offset:
        raise ValueError(f"its {len(data)} bytes do not even hold the sizes of its columns")
    stored = iter(struct.unpack_from(f"<{offset // 4}I", data))
    values: dict[str, tuple[str, memoryview]] = {}
    crc = 0
    for name, encoding, size in zip(reader.column_names, reader.column_encodings, reader.column_sizes, strict=True):
        start, offset = offset, offset + (next(stored) if size is None else size)
        values[name] = encoding, data[start:offset]
        if name == CRC:
            crc = zlib.crc32(data[offset:], zlib.crc32(bytes(4), zlib.crc32(data[:start])))
    if offset != len(data) or crc != int.from_bytes(values[CRC][1], "little"):
        raise ValueError(f"its {CRC} is not that of its bytes")
    return {
        name: mds_decode(encoding, bytes(value) if encoding == "str" else value)  # type: ignore[arg-type]
        for name, (encoding, value) in values.items()
    }


def decompressed(stored: bytes, shard: dict[str, Any]) -> bytes:
    """Returns the uncompressed bytes of a shard's file. Raises ValueError where it is damaged.

    `stored` are the file's bytes, `shard` is its entry in an index.
    """
    if shard["zip_data"] is None:
        return stored
    from streaming.base.compression import decompress

    try:
        return decompress(shard["compression"], stored)
    except Exception as error:  # each method of compression raises its own kind
        raise ValueError(f"cannot be decompressed ({error})") from error


def decode_rows(raw: bytes, shard: dict[str, Any], expected: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a shard's uncompressed bytes. Raises ValueError where they are damaged.

    `shard` is its entry in an index, `expected` are names and encodings of the columns by the card. Other columns are not
    decoded: MDS unpickles where an index asks for it.
    """
    from streaming.base.format.mds.reader import MDSReader

    stated = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    if stated != expected:
        raise ValueError(f"has other columns than the card's: {sorted(stated.items() ^ expected.items())}")
    offsets = np.frombuffer(raw, "<u4", min(len(raw) // 4, shard["samples"] + 2))
    if len(offsets) < 2 or offsets[0] != shard["samples"] or len(offsets) != offsets[0] + 2:
        raise ValueError(f"does not hold the {shard['samples']} samples of its index")
    if offsets[-1] != len(raw) or (np.diff(offsets[1:].astype(np.int64)) <= 0).any():
        raise ValueError("has samples at impossible places")
    number = 0
    try:
        reader, data = MDSReader.from_json("", None, shard), memoryview(raw)
        for number, (start, end) in enumerate(pairwise(offsets[1:].tolist())):  # noqa: B007 (for the message)
            yield decode_sample(reader, data[start:end])
    except Exception as error:  # MDS promises no set of exceptions for damaged data
        raise ValueError(f"sample {number} cannot be decoded ({type(error).__name__}: {error})") from error
