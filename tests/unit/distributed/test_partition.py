"""Which part of each parameter a process keeps, against a flat buffer that is cut by hand."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from pretrain.distributed.partition import Slot, cut_into_pieces

SHAPES = ((3, 4), (1,), (5,), (2, 2, 2))
OFFSETS = (0, *accumulate(torch.Size(s).numel() for s in SHAPES))
SLOTS = [Slot(str(i), shape, 0, offset) for i, (shape, offset) in enumerate(zip(SHAPES, OFFSETS, strict=False))]


def test_numel() -> None:
    assert [slot.numel for slot in SLOTS] == [12, 1, 5, 8]
    assert Slot("scalar", (), 0, 0).numel == 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 13, 26, 40])
def test_partitions_hold_each_element_once(size: int) -> None:
    """The parts that all processes keep, put together, are the parameters; for any size of a partition."""
    flat = torch.arange(OFFSETS[-1] + size)  # with padding
    for slot in SLOTS:
        whole = torch.full((slot.numel,), -1)
        ranks = []
        for rank in range(len(flat) // size + 1):
            if (overlap := slot.overlap(rank, size)) is not None:
                ranks.append(rank)
                partition = flat[rank * size : (rank + 1) * size]
                assert (whole[overlap.in_parameter] == -1).all()
                whole[overlap.in_parameter] = partition[overlap.in_partition]
        assert whole.tolist() == list(range(slot.offset, slot.offset + slot.numel))
        assert ranks == list(slot.ranks(size))


@pytest.mark.parametrize(("processes", "size", "length"), [(1, 26, 10), (2, 14, 8), (3, 9, 6), (4, 7, 4), (4, 7, 28)])
def test_pieces_of_buckets_are_each_in_one_shard_and_one_partition(processes: int, size: int, length: int) -> None:
    """And together they are the flat buffer, in order; partitions may be smaller or larger than buckets."""
    covered = []
    for start in range(0, processes * size, length):
        bucket = range(start, min(start + length, processes * size))
        shard = len(bucket) // processes
        for piece in cut_into_pieces(bucket, processes, size):
            assert {(i - start) // shard for i in piece.range} == {piece.summed_by}
            assert {i // size for i in piece.range} == {piece.owner}
            covered += piece.range
    assert covered == list(range(processes * size))
