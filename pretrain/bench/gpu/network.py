"""Network: all-reduce and gather among the GPUs of the machine, at the sizes of a training step's gradients and weights."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from pretrain.bench.gpu.session import Numbers, Session
from pretrain.models.cost import count_parameters


def run(session: Session) -> None:
    """Measures both exchanges between the GPUs; with a single one it says so."""
    size = int(os.environ["WORLD_SIZE"])
    if size == 1:
        session.put("", "not run", "there is one GPU" if session.cuda else "a CPU has no network of GPUs")
        return
    dist.init_process_group("nccl" if session.cuda else "gloo")
    try:
        parameters = count_parameters(session.shapes.focusdit).total // size * size
        gradients = torch.ones(parameters, device=session.device, dtype=torch.bfloat16)
        own = gradients[: parameters // size].clone()
        exchanges: dict[str, tuple[Callable[[], object], float]] = {
            "all-reduce of the gradients": (lambda: dist.all_reduce(gradients), 2 * (size - 1) / size),
            "gather of the weights": (lambda: dist.all_gather_into_tensor(gradients, own), (size - 1) / size),
        }
        for name, (exchange, share) in exchanges.items():
            session.measure(name, _rate, exchange, 2 * parameters, share)
    finally:
        dist.destroy_process_group()


def _rate(session: Session, exchange: Callable[[], object], size: int, share: float) -> Numbers:
    """`share` of the bytes must pass each GPU's link at least."""
    seconds = session.seconds(exchange)
    return {"GB": size / 1e9, "ms": 1e3 * seconds, "GB/s a GPU": share * size / seconds / 1e9}
