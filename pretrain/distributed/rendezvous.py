"""The start of a run's processes: who they are, on which device, and how they find one another."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from pretrain.distributed import deepspeed_private, torch_private
from pretrain.distributed.numa import bind_to_gpu
from pretrain.distributed.world import World

LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
RENDEZVOUS = timedelta(minutes=10)


def init_distributed(timeout: timedelta = timedelta(minutes=30)) -> World:
    """Joins the processes that a launcher started (RANK, WORLD_SIZE, …), or starts alone where there is none.

    Args:
        timeout: the longest that a collective may take. The processes have RENDEZVOUS to find one another.

    Raises:
        ValueError: a launcher set some of the variables only, or there are fewer GPUs than processes on this node.
        RuntimeError: the processes did not find one another.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        os.environ.update(LAUNCHER | {"MASTER_PORT": os.environ.get("MASTER_PORT", "0")})
    if missing := [v for v in (*LAUNCHER, "MASTER_PORT") if v not in os.environ]:
        raise ValueError(
            f"the launcher did not set {', '.join(missing)}; torchrun and slurm/*.sh set all that is needed"
        )
    device = choose_device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if (problem := bind_to_gpu(device)) is not None:
            print(f"WARNING: process {os.environ['RANK']}: {problem}", flush=True)
    else:
        deepspeed_private.disable_shared_memory_collectives()
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=RENDEZVOUS, verbose=False)
    except dist.DistError as error:
        raise RuntimeError(
            f"no rendezvous at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]}); "
            "another program has this MASTER_PORT, or not all processes started: see what they say"
        ) from error
    torch_private.set_timeout(timeout)
    return World(dist.get_rank(), dist.get_world_size(), device, timeout)


def choose_device(local_rank: int) -> torch.device:
    """The GPU with this number on this node, or the CPU where the node has none.

    Raises:
        ValueError: the node has no GPU of this number, or none of those that CUDA_VISIBLE_DEVICES names.
    """
    gpus = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not gpus and named.startswith((*"0123456789", "GPU-", "MIG-")):
        # Training would go on on the CPU, or wait for the other processes, which do have GPUs.
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={named} names GPUs, but torch finds none on {socket.gethostname()}: see nvidia-smi there; "
            "unset it to train on the CPU"
        )
    if gpus and local_rank >= gpus:
        raise ValueError(f"local rank {local_rank} has no GPU: this node shows {gpus}; start one process per GPU")
    return torch.device("cuda", local_rank) if gpus else torch.device("cpu")


def shutdown() -> None:
    """Leaves the process group; another one can be started afterwards."""
    if dist.is_initialized():
        dist.destroy_process_group()
    deepspeed_private.forget_process_groups()
