"""The start of a run's processes: who they are, on which device, and how they find one another."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from pretrain.distributed import deepspeed_private, torch_private
from pretrain.distributed.device import choose_device, idle_gpus, shared_gpu
from pretrain.distributed.launcher import adopt_launcher
from pretrain.distributed.numa import bind_to_gpu
from pretrain.distributed.store import KeyValueStore
from pretrain.distributed.world import World

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
RENDEZVOUS = timedelta(minutes=10)


def init_distributed(timeout: timedelta = timedelta(minutes=30)) -> World:
    """Joins the processes that a launcher started (`launcher.py`), or starts alone where there is none.

    Args:
        timeout: the longest that a collective may take. The processes have RENDEZVOUS to find one another.

    Raises:
        ValueError: a launcher set some of its variables only, there are fewer GPUs than processes on this node, or torchrun
            started several nodes' processes again.
        RuntimeError: the processes did not find one another.
    """
    adopt_launcher()
    if "RANK" not in os.environ:
        os.environ.update(ALONE | {"MASTER_PORT": os.environ.get("MASTER_PORT", "0")})
    device = choose_device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if os.environ["RANK"] == "0" and (warning := idle_gpus(int(os.environ["LOCAL_WORLD_SIZE"]))):
            print(f"WARNING: {warning}", flush=True)
        if (problem := bind_to_gpu(device)) is not None:
            print(f"WARNING: process {os.environ['RANK']}: {problem}", flush=True)
    else:
        deepspeed_private.disable_shared_memory_collectives()
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if (store := _store_under_torchrun()) is not None:  # DeepSpeed takes the group as it is
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=RENDEZVOUS)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=RENDEZVOUS, verbose=False)
    except dist.DistError as error:
        raise RuntimeError(
            f"no rendezvous at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]}); "
            "another program has this MASTER_PORT, or not all processes started: see what they say"
        ) from error
    torch_private.set_timeout(timeout)
    world = World(dist.get_rank(), dist.get_world_size(), device, timeout)
    if device.type == "cuda" and world.size > 1:
        _require_own_gpu(world)
    return world


def _store_under_torchrun() -> dist.Store | None:
    """A store of process 0 where torchrun would keep it; None where torch's own choice is right.

    torchrun's would end with it, before the last checkpoint is written, and it is one for all of its restarts (2.11, by
    --standalone, too), with the addresses of processes that have ended.

    Raises:
        ValueError: several nodes' processes were started again: each node may have counted other restarts.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if restart != "0" and os.environ["GROUP_WORLD_SIZE"] != "1":
        raise ValueError(
            "torchrun's restarts on several nodes keep the addresses of processes that have ended: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it and give --rdzv-backend=c10d, or leave --max-restarts out"
        )
    host, rank, size = os.environ["MASTER_ADDR"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torchruns = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=RENDEZVOUS)
    key = f"port of process 0, restart {restart}"
    port = 0 if rank == 0 else int(torchruns.get(key))
    own = dist.TCPStore(host, port, size, is_master=rank == 0, timeout=RENDEZVOUS, wait_for_workers=False)
    if rank == 0:
        torchruns.set(key, str(own.port))
    return own


def _require_own_gpu(world: World) -> None:
    """Raises ValueError on all processes where two have one GPU: NCCL would fail, or wait. It needs no collective itself."""
    store = KeyValueStore(RENDEZVOUS.total_seconds())
    uuid = str(torch.cuda.get_device_properties(world.device).uuid)
    store.set(f"gpu/{world.rank}", [socket.gethostname(), uuid])
    if problem := shared_gpu(store.get_all([f"gpu/{rank}" for rank in range(world.size)])):
        raise ValueError(problem)


def shutdown() -> None:
    """Leaves the process group; another one can be started afterwards."""
    if dist.is_initialized():
        dist.destroy_process_group()
    deepspeed_private.forget_process_groups()
