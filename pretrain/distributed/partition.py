"""Places of the parameters in ZeRO-2's flat buffers, and the parts that each process keeps. Needs no torch.

ZeRO-2 lays the parameters of each optimizer group end to end in one flat buffer, pads it to a multiple of the processes, and
cuts it into partitions of equal size, one a process. The slots are the same for every number of processes; the size of a
partition is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Overlap:
    """The elements of one parameter that one partition holds.

    Attributes:
        in_parameter: their range in the parameter, flattened.
        in_partition: the same elements' range in the partition.
    """

    in_parameter: slice
    in_partition: slice


@dataclass(frozen=True)
class Slot:
    """The place of one parameter: its group's flat buffer holds it from `offset` on."""

    name: str
    shape: tuple[int, ...]
    group: int
    offset: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    def overlap(self, rank: int, partition_size: int) -> Overlap | None:
        """The part of this parameter in the partition of process `rank`; None where there is none."""
        start = rank * partition_size
        low, high = max(self.offset, start), min(self.offset + self.numel, start + partition_size)
        if low >= high:
            return None
        return Overlap(slice(low - self.offset, high - self.offset), slice(low - start, high - start))

    def ranks(self, partition_size: int) -> range:
        """The processes whose partitions hold this parameter, in order of its elements."""
        return range(self.offset // partition_size, (self.offset + self.numel - 1) // partition_size + 1)


@dataclass(frozen=True)
class Piece:
    """A range of a flat buffer that one process sums over all, and that is in the partition of one process.

    Attributes:
        summed_by: the process that receives the sum.
        owner: the process whose partition it is in.
    """

    range: range
    summed_by: int
    owner: int


def cut_into_pieces(bucket: range, processes: int, partition_size: int) -> list[Piece]:
    """Cuts a range of a flat buffer, of which each process sums an equal shard, at the shards' and the partitions' ends."""
    shard, rest = divmod(len(bucket), processes)
    assert not rest, "the processes divide a bucket"
    pieces = []
    for rank in range(processes):
        start, stop = bucket.start + rank * shard, bucket.start + (rank + 1) * shard
        for owner in range(start // partition_size, (stop - 1) // partition_size + 1):
            part = range(max(start, owner * partition_size), min(stop, (owner + 1) * partition_size))
            pieces.append(Piece(part, rank, owner))
    return pieces
