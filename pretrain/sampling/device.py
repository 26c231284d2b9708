"""The device that a command computes on."""

from __future__ import annotations

import os

import torch

from pretrain.distributed.device import choose_device


def device_of(name: str | None) -> torch.device:
    """The named device; by default this process's own GPU, or the CPU. Raises ValueError for one that is not there."""
    if name is not None:
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # torch's own, by kind of device
            raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return choose_device(int(os.environ.get("LOCAL_RANK", "0")))
