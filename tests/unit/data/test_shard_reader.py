"""One sample from its shard: every flipped byte is noticed, and so is a shard that is cut off or lost."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from data_sets import SET, entry, file_of, flip, places
from streaming.base.format.mds.reader import MDSReader

from data_prep.common import mds
from pretrain.data.shard_reader import Shard


def test_every_flipped_byte_of_a_sample_is_noticed(root: Path) -> None:
    """Of its place in the shard's table with every bit, of the sizes in front of its columns with every bit, of all else."""
    file, about, chance = file_of(root, 1), entry(root, 1), random.Random(0)
    shard, number = Shard(MDSReader.from_json(str(root / SET), None, about)), 5
    begin, end = places(file)[number : number + 2].tolist()
    sizes = 4 * about["column_sizes"].count(None)
    assert sizes == 20 and end - begin > 16 << 10
    header = [
        (at, bit) for at in (*range(4 + 4 * number, 12 + 4 * number), *range(begin, begin + sizes)) for bit in range(8)
    ]
    expected = shard[number]
    for at, bit in (*header, *((at, chance.randrange(8)) for at in range(begin + sizes, end))):
        flip(file, at, bit)
        with pytest.raises(ValueError, match=r"crc32 is not|its place is|do not even hold the sizes"):
            shard[number]
        flip(file, at, bit)
    again = shard[number]
    assert again.keys() == expected.keys()
    assert all(np.array_equal(again[name], value) for name, value in expected.items())
    assert mds.CRC in again


def test_two_flipped_sizes_that_add_up_are_noticed(root: Path) -> None:
    """The bytes of all columns would be the same ones, split elsewhere."""
    file, about = file_of(root, 0), entry(root, 0)
    shard, begin = Shard(MDSReader.from_json(str(root / SET), None, about)), int(places(file)[2])
    raw = bytearray(file.read_bytes())
    first, second = np.frombuffer(raw, "<u4", 2, begin)
    raw[begin : begin + 8] = np.array([first - 1, second + 1], "<u4").tobytes()
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="crc32 is not that of its bytes"):
        shard[2]
