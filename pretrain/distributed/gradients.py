"""Gradients of an optimizer step: added up in fp32 over its micro-batches, and reduced once over the processes.

Under ZeRO-2, DeepSpeed 0.19.7 adds up and reduces in the precision of the weights, and reduces each micro-batch anew; where it
overlaps that with the backward pass, it waits for the device after each. Its hooks call the reducer below instead
(`deepspeed_private.py`).

Each optimizer group has one fp32 buffer, laid out as ZeRO-2's flat weights. A parameter's gradient is added to its place as soon
as the backward pass has made it, and freed. In the last micro-batch the buffer is summed over the processes bucket by bucket
while the backward pass goes on: of each bucket, every process receives the sum of an equal shard. ZeRO-2's partitions are not
these shards, so in the end each process sends what it summed of the others' partitions, a small part of a buffer. All of it
happens in place. docs/choices.md says what this costs beside other ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.distributed.partition import Slot, cut_into_pieces
from pretrain.distributed.world import World, exchange, reduce_scatter


@dataclass
class Bucket:
    """A range of a group's buffer that is summed over the processes at once.

    Attributes:
        parameters: those that lie in it, by their `id`.
        missing: the number of those whose gradient of the step's last micro-batch is still to come.
    """

    group: int
    range: range
    parameters: list[int]
    missing: int


class GradientReducer:
    """Sums of a step's gradients: `add` for each parameter in each backward pass, `finish` after it.

    Attributes:
        sums: each group's buffer; between `finish` and the next `add`, others may compute in it.
        partitions: this process's part [n] of each group's mean gradient, in fp32; complete after the step's last `finish`.
    """

    def __init__(
        self, slots: Mapping[int, Slot], sizes: Sequence[int], bucket_size: int, overlap: bool, world: World
    ) -> None:
        """
        Args:
            slots: each parameter's place by its `id`, in the order in which the forward pass uses the parameters.
            sizes: elements of each group's flat buffer, with its padding.
            bucket_size: elements that are summed over the processes at once; about that many.
            overlap: reduce while the last backward pass goes on, not after it; the result is the same.
        """
        self.world, self.overlap = world, overlap
        self.sums = [torch.zeros(size, device=world.device) for size in sizes]
        self.partitions = [s.chunk(world.size)[world.rank] for s in self.sums]
        self._views = {p: self.sums[s.group][s.offset : s.offset + s.numel].view(s.shape) for p, s in slots.items()}
        self._buckets = cut_into_buckets(slots, sizes, bucket_size, world.size)
        self._buckets_of = {p: [b for b in self._buckets if p in b.parameters] for p in slots}
        self._pieces = [
            (self.sums[bucket.group][piece.range.start : piece.range.stop], piece.summed_by, piece.owner)
            for bucket in self._buckets
            for piece in cut_into_pieces(bucket.range, world.size, sizes[bucket.group] // world.size)
        ]
        self._begin()

    def _begin(self) -> None:
        """Begins a step."""
        self._added: set[int] = set()
        self._seen: set[int] = set()
        self._reductions: list[Callable[[], None]] = []
        self._streams: set[torch.cuda.Stream] = set()
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    @torch.no_grad()
    def add(self, parameter: Tensor, last: bool) -> None:
        """Adds a parameter's gradient of the current micro-batch, and frees it.

        Args:
            last: this is the step's last micro-batch.
        """
        key = id(parameter)
        assert parameter.grad is not None and key not in self._seen, "one gradient for each parameter and backward pass"
        view = self._views[key]
        view.add_(parameter.grad) if key in self._added else view.copy_(parameter.grad)
        parameter.grad = None
        self._added.add(key)
        self._seen.add(key)
        if parameter.is_cuda:
            self._streams.add(torch.cuda.current_stream(parameter.device))
        if last and self.overlap:
            for bucket in self._buckets_of[key]:
                bucket.missing -= 1
            while self._remaining and not self._remaining[0].missing:
                self._reduce_next()

    @torch.no_grad()
    def finish(self, last: bool) -> None:
        """Ends a micro-batch; after the step's last one the partitions are complete."""
        self._seen.clear()
        if not last:
            return
        for key in self._views.keys() - self._added:  # parameters that this step did not use
            self._views[key].zero_()
        while self._remaining:
            self._reduce_next()
        for wait in self._reductions:
            wait()
        if self.world.size > 1:
            exchange(self._pieces, self.world)
            for partition in self.partitions:
                partition.div_(self.world.size)
        self._begin()

    @property
    def _remaining(self) -> list[Bucket]:
        """Buckets that are not being reduced yet; the order is the same on all processes."""
        return self._buckets[len(self._reductions) :]

    def _reduce_next(self) -> None:
        bucket = self._remaining[0]
        for stream in self._streams:  # compiled code may make gradients on several (DeepSpeed issue 8061)
            torch.cuda.current_stream(self.world.device).wait_stream(stream)
        part = self.sums[bucket.group][bucket.range.start : bucket.range.stop]
        self._reductions.append(reduce_scatter(part, self.world))


def cut_into_buckets(slots: Mapping[int, Slot], sizes: Sequence[int], bucket_size: int, processes: int) -> list[Bucket]:
    """Cuts the groups' buffers into buckets, in the order in which the backward pass completes them."""
    unit = 4 * processes  # so that shards begin at multiples of 16 bytes
    length = max(1, bucket_size // unit) * unit
    buckets = []
    for group, size in enumerate(sizes):
        for start in range(0, size, length):
            stop = min(start + length, size)
            inside = [
                p for p, s in slots.items() if s.group == group and s.offset < stop and start < s.offset + s.numel
            ]
            buckets.append(Bucket(group, range(start, stop), inside, len(inside)))
    order = {p: i for i, p in enumerate(slots)}
    # The backward pass comes to the parameters in reverse; the first one of a bucket completes it.
    return sorted(buckets, key=lambda b: -min((order[p] for p in b.parameters), default=len(order)))
