"""The processes of a run, and every collective between them that this project calls itself.

A collective must be called by all processes in the same order; with one process each of them does nothing. What DeepSpeed
exchanges (gradients, and the weights after a step) it exchanges by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the processes of a run.

    Attributes:
        rank: this process's number, from 0.
        size: the number of processes.
        device: the device that this process computes on.
        timeout: the longest that a collective may take.
    """

    rank: int
    size: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=30)

    @classmethod
    def alone(cls) -> World:
        """One process on the CPU, without a process group."""
        return cls(0, 1, torch.device("cpu"))


def barrier(world: World) -> None:
    """Waits until all processes are here."""
    if world.size > 1:
        dist.barrier()


def all_reduce(tensor: Tensor, world: World) -> Tensor:
    """Sums a tensor of one shape over all processes, in place, and returns it."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_into(whole: Tensor, part: Tensor, world: World) -> None:
    """Fills `whole` [world.size · n] on all processes with each process's `part` [n], in order of their ranks."""
    if world.size > 1:
        dist.all_gather_into_tensor(whole, part)


def reduce_scatter(tensor: Tensor, world: World) -> Callable[[], None]:
    """Begins to sum a tensor [world.size · n] over all processes in place, n elements for each process.

    Returns:
        A function that waits for it; afterwards process r holds the sum in part r, and the other parts are as they were.
    """
    if world.size == 1:
        return lambda: None
    work = dist.reduce_scatter_tensor(tensor.chunk(world.size)[world.rank], tensor, async_op=True)
    assert work is not None
    return work.wait


def exchange(parts: Iterable[tuple[Tensor, int, int]], world: World) -> None:
    """Copies each tensor from its process to another one, in place; all at once.

    Args:
        parts: each tensor with the process that sends it and the one that receives it; the same list on all processes.
    """
    between = [part for part in parts if part[1] != part[2]]
    sent = [dist.P2POp(dist.isend, t, receiver) for t, sender, receiver in between if sender == world.rank]
    received = [dist.P2POp(dist.irecv, t, sender) for t, sender, receiver in between if receiver == world.rank]
    if sent or received:
        for work in dist.batch_isend_irecv(sent + received):
            work.wait()


def all_gather(item: T, world: World) -> list[T]:
    """Returns every process's item, in order of their ranks. Items are pickled."""
    items: list[Any] = [item] * world.size
    if world.size > 1:
        dist.all_gather_object(items, item)
    return items


def broadcast(item: T, world: World) -> T:
    """Returns process 0's item on all processes. Items are pickled."""
    items = [item]
    if world.size > 1:
        dist.broadcast_object_list(items, src=0)
    return items[0]


def in_each(action: Callable[[], T], world: World) -> list[T]:
    """Runs an action in every process; returns all results on all processes, in order of their ranks. Results are pickled.

    Raises:
        ValueError: on all processes, where the action raised ValueError or OSError in any.
    """
    outcomes = all_gather(_attempt(action, world), world)
    if problems := [problem for _, problem in outcomes if problem is not None]:
        raise ValueError(problems[0])
    return [cast(T, result) for result, _ in outcomes]


def once(action: Callable[[], T], world: World) -> T:
    """Runs an action in process 0; returns its result on all processes, pickled.

    Raises:
        ValueError: on all processes, where the action raised ValueError or OSError.
    """
    result, problem = broadcast(_attempt(action, world) if world.rank == 0 else (None, None), world)
    if problem is not None:
        raise ValueError(problem)
    return cast(T, result)


def once_per_node(action: Callable[[], T], world: World) -> T | None:
    """Runs an action in the first process of each node, while the others wait.

    Returns:
        The action's result in the first process of a node, None in the others.

    Raises:
        ValueError: on all processes, where the action raised ValueError or OSError on any node.
    """
    result, problem = _attempt(action, world) if int(os.environ.get("LOCAL_RANK", 0)) == 0 else (None, None)
    if problems := [p for p in all_gather(problem, world) if p is not None]:
        raise ValueError(problems[0])
    return result


def _attempt(action: Callable[[], T], world: World) -> tuple[T | None, str | None]:
    """Runs an action; returns its result, or the message of its ValueError or OSError. One process alone raises it."""
    try:
        return action(), None
    except (ValueError, OSError) as error:
        if world.size == 1:
            raise
        return None, str(error)
