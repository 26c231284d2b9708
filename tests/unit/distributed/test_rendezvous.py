"""The start of the processes: alone without a launcher, refusals that name the mend, and a second start after the first."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
import torch
from engines import engine_of, one_process, train_steps
from support import free_port, launcher

from pretrain.distributed import rendezvous
from pretrain.distributed.launcher import TORCH
from pretrain.distributed.rendezvous import init_distributed, shutdown

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCH, "CUDA_VISIBLE_DEVICES"):
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


@pytest.mark.parametrize("name", TORCH)
def test_a_launcher_that_sets_some_of_the_variables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other, value in launcher(0, 1, "29500").items():
        if other in TORCH and other != name:
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


def test_torchruns_restarts_on_several_nodes_are_told_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its nodes may have counted other restarts, by which the starts are told apart."""
    torchruns = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    for name, value in (launcher(0, 2, str(free_port())) | torchruns).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it and give --rdzv-backend=c10d"
    ):
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
