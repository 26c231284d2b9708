"""Private interfaces of torch, each reached here and nowhere else; docs/dependencies.md says what breaks without them."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Store, distributed_c10d

PRIVATE = {
    "torch": ("_dynamo", "_foreach_lerp_", "_foreach_norm"),
    "torch.distributed.distributed_c10d": ("_set_pg_timeout", "_get_default_store"),
    "torch.UntypedStorage": ("_new_shared",),
}
"""The names that are used below, by their owner: the table of docs/dependencies.md."""


def set_timeout(timeout: timedelta, group: ProcessGroup | None = None) -> None:
    """Sets the longest that a collective of a process group may take; None is the default group."""
    distributed_c10d._set_pg_timeout(timeout, group)


def clone_default_store() -> Store:
    """Opens one more connection to the store of the rendezvous, which process 0 keeps."""
    return distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def new_shared_storage(size: int) -> torch.UntypedStorage:
    """Allocates `size` bytes of memory that other processes can map."""
    return torch.UntypedStorage._new_shared(size)


def forbid_falling_back(graphs: int) -> None:
    """Lets torch.compile keep this many graphs of one function; one more is an error, no longer silently eager.

    It holds for the whole process.
    """
    torch._dynamo.config.recompile_limit = graphs
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def mark_changing(tensor: Tensor, dim: int) -> None:
    """Tells torch.compile that a dimension differs from call to call: one graph serves all its sizes."""
    torch._dynamo.mark_dynamic(tensor, dim)


def compiled_graphs() -> int:
    """The number of graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def norms(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of each of n tensors, [n] in fp32, computed together."""
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float32))


def lerp_(tensors: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Moves each tensor towards its end, in place and computed together: tensor + weight · (end − tensor)."""
    torch._foreach_lerp_(tensors, ends, weight)
