"""The start of the processes: alone without a launcher, refusals that name the mend, and a second start after the first."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
import torch
from engines import engine_of, one_process, train_steps
from support import launcher

from pretrain.distributed import rendezvous
from pretrain.distributed.rendezvous import LAUNCHER, choose_device, init_distributed, shutdown

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHER, "MASTER_PORT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@cpu_only
def test_a_process_alone_can_start_twice() -> None:
    """Groups of the first start are forgotten: the second engine works like the first."""
    masters = []
    for _ in range(2):
        with one_process() as world:
            assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
            assert world.timeout == timedelta(minutes=30)
            engine = engine_of(world)
            train_steps(engine, range(2))
            masters.append([m.detach().clone() for m in engine.masters])
        assert not torch.distributed.is_initialized()
        assert "RANK" not in os.environ
    assert all(torch.equal(a, b) for a, b in zip(*masters, strict=True))
    shutdown()  # without a group there is nothing to leave


@pytest.mark.parametrize("name", [*LAUNCHER, "MASTER_PORT"])
def test_a_launcher_that_sets_some_of_the_variables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other, value in launcher(0, 1, "29500").items():
        if other in (*LAUNCHER, "MASTER_PORT") and other != name:
            monkeypatch.setenv(other, value)
    with pytest.raises(ValueError, match=f"the launcher did not set {name}; torchrun and slurm"):
        init_distributed()


@cpu_only
def test_a_port_that_another_program_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in launcher(0, 2, port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RuntimeError, match=rf"no rendezvous at 127\.0\.0\.1:{port} .*another program has this"):
            init_distributed()


def test_processes_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rendezvous ends after RENDEZVOUS, not after the collectives' timeout."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    monkeypatch.setattr(rendezvous, "RENDEZVOUS", timedelta(seconds=1))
    for name, value in launcher(0, 2, port).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="not all processes started"):
        init_distributed(timeout=timedelta(hours=1))


@pytest.mark.parametrize(
    ("gpus", "visible", "local_rank", "device"),
    [
        (0, None, 3, "cpu"),
        (0, "", 0, "cpu"),  # GPUs are hidden on purpose
        (0, "-1", 0, "cpu"),
        (4, None, 3, "cuda:3"),
        (2, "4,5", 1, "cuda:1"),
    ],
)
def test_devices(gpus, visible, local_rank, device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose_device(local_rank) == torch.device(device)


@pytest.mark.parametrize(
    ("gpus", "visible", "local_rank", "said"),
    [
        (0, "0", 0, "CUDA_VISIBLE_DEVICES=0 names GPUs, but torch finds none"),
        (0, "GPU-5ebe9f43", 0, "CUDA_VISIBLE_DEVICES=GPU-5ebe9f43 names GPUs, but torch finds none"),
        (2, None, 2, "local rank 2 has no GPU: this node shows 2; start one process per GPU"),
    ],
)
def test_gpus_that_are_not_there(gpus, visible, local_rank, said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=said):
        choose_device(local_rank)
