"""Which part of each parameter a process keeps, against a flat buffer that is cut by hand."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from pretrain.distributed.partition import Slot

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
