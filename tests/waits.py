"""Records what training steps ask of the device: run in a training's process by `fork_training(before=…)`.

On a CPU nothing waits, so what would wait on a GPU is known by its operations: reading a tensor's values on the host, and
operations whose result's size depends on values. `torch.cuda.synchronize` and its like are counted where DeepSpeed calls them.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {"item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__contains__"}
COPIES = {"to", "tensor", "as_tensor"}
SIZED_BY_VALUES = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}


def _place() -> str:
    """The innermost line of this project, DeepSpeed or an optimizer that runs now."""
    ours = ("/pretrain/", "/deepspeed/", "/optim/")
    frames = [f for f in traceback.extract_stack() if any(folder in f.filename for folder in ours)]
    return f"{'/'.join(Path(frames[-1].filename).parts[-2:])} {frames[-1].name}"


class _Calls(TorchFunctionMode):
    """Reads, and copies to the device, that a CPU does without an operation."""

    def __init__(self, reads: list[str]):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        on_device = kwargs.get("device") is not None or any(isinstance(a, torch.device) for a in args[1:])
        waits = on_device and not kwargs.get("non_blocking") and name in COPIES
        if waits or (name in READS and isinstance(args[0], Tensor)):
            self.reads.append(f"{name} in {_place()}")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Reads below Python, in the backward pass too."""

    def __init__(self, reads: list[str]):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in SIZED_BY_VALUES or by_mask:
            self.reads.append(f"{func} in {_place()}")
        return func(*args, **(kwargs or {}))


def record(out: Path) -> None:
    """Writes a line of JSON for each training step: what it read, and what DeepSpeed synchronised."""
    from deepspeed.accelerator import get_accelerator

    from pretrain import training
    from pretrain.distributed import optimizer

    whole, build = training.train_step, optimizer.build_optimizer
    reads: list[str] = []

    def step(t: Any, batches: Any, state: Any) -> Any:
        reads.clear()
        with _Calls(reads), _Operations(reads):
            after = whole(t, batches, state)
        with out.open("a") as file:
            file.write(json.dumps([after.step, reads]) + "\n")
        return after

    def synchronize(*_: Any) -> None:
        reads.append(f"synchronize in {_place()}")

    def fused(*args: Any) -> Any:  # as on a GPU; the other one reads its count of steps, which lies on the host
        made = build(*args)
        for group in (made.defaults, *made.param_groups):
            group["fused"] = True
        return made

    training.train_step, optimizer.build_optimizer = step, fused
    accelerator = type(get_accelerator())
    accelerator.synchronize = synchronize  # type: ignore[method-assign]
