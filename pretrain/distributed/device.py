"""The device of a process among those of its node."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

from data_prep.common.words import counted


def choose_device(local_rank: int) -> torch.device:
    """The GPU with this number on this node, the only one that this process sees, or the CPU where the node has none.

    Raises:
        ValueError: the node has no GPU of this number, or none of those that CUDA_VISIBLE_DEVICES names.
    """
    gpus = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # DeepSpeed's launcher, which sets CROSS_SIZE, names as many as --num_gpus says, on a machine without any, too.
    unasked = "CROSS_SIZE" in os.environ and not _has_gpu_files()
    if not gpus and named.startswith((*"0123456789", "GPU-", "MIG-")) and not unasked:
        # Training would go on on the CPU, or wait for the other processes, which do have GPUs.
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={named} names GPUs, but torch finds none on {socket.gethostname()}: see nvidia-smi there; "
            "unset it to train on the CPU"
        )
    # The only one is this process's own (srun --gpus-per-task=1), or shared by mistake, which `_require_own_gpu` finds.
    if gpus == 1:
        return torch.device("cuda", 0)
    if gpus and local_rank >= gpus:
        raise ValueError(f"local rank {local_rank} has no GPU: this node shows {gpus}; start one process per GPU")
    return torch.device("cuda", local_rank) if gpus else torch.device("cpu")


def _has_gpu_files() -> bool:
    """Whether this node has a GPU of NVIDIA's or AMD's, whether torch finds it or not."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def idle_gpus(local_size: int) -> str | None:
    """A warning where this node shows more GPUs than the launcher started processes on it (`local_size`)."""
    gpus = torch.cuda.device_count()
    if gpus <= local_size:
        return None
    return (
        f"{counted(local_size, 'process', 'processes')} on {socket.gethostname()}, which shows {gpus} GPUs: "
        f"{gpus - local_size} stay idle; python -m pretrain.launch starts a process for each"
    )


def shared_gpu(gpus: list[list[str]]) -> str | None:
    """The problem where two processes have the same GPU; `gpus` holds each process's host and its GPU's UUID."""
    first: dict[str, int] = {}
    for rank, (host, uuid) in enumerate(gpus):
        if (other := first.setdefault(uuid, rank)) != rank:
            return (
                f"processes {other} and {rank} have one GPU of {host} ({uuid}): start one process per GPU, and let "
                "CUDA_VISIBLE_DEVICES name all of the node's, or another one for each process"
            )
    return None
