"""Each process has a GPU of its own, or all have the CPU; GPUs that are not there, or that two processes have, are named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.distributed import device as devices
from pretrain.distributed import engine
from pretrain.distributed.device import choose_device, idle_gpus, shared_gpu
from pretrain.distributed.world import World


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("gpus", "visible", "local_rank", "device"),
    [
        (0, None, 3, "cpu"),
        (0, "", 0, "cpu"),  # GPUs are hidden on purpose
        (0, "-1", 0, "cpu"),
        (4, None, 3, "cuda:3"),
        (2, "4,5", 1, "cuda:1"),
        (1, "5", 3, "cuda:0"),  # srun --gpus-per-task=1: each task sees its own
        (1, None, 1, "cuda:0"),
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


def test_gpus_that_deepspeeds_launcher_names_on_a_machine_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """`deepspeed --num_gpus 2` sets CUDA_VISIBLE_DEVICES=0,1 there; with GPUs that torch does not find that is wrong."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("CROSS_SIZE", "1")
    monkeypatch.setattr(devices, "_has_gpu_files", lambda: False)
    assert choose_device(1) == torch.device("cpu")
    monkeypatch.setattr(devices, "_has_gpu_files", lambda: True)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=0,1 names GPUs, but torch finds none"):
        choose_device(1)


def test_gpus_that_no_process_has_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """python -m pretrain.train, alone, on a node with eight."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert idle_gpus(8) is None
    said = idle_gpus(1)
    assert said is not None and said.startswith("1 process on ") and "shows 8 GPUs: 7 stay idle; python -m" in said


def test_two_processes_with_one_gpu_are_named() -> None:
    assert shared_gpu([["n1", "GPU-a"], ["n1", "GPU-b"], ["n2", "GPU-c"]]) is None
    problem = shared_gpu([["n1", "GPU-a"], ["n1", "GPU-b"], ["n1", "GPU-b"]])
    assert problem is not None and problem.startswith("processes 1 and 2 have one GPU of n1 (GPU-b): start one process")


def test_deepspeed_is_told_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would take the one numbered LOCAL_RANK, which a task with one visible GPU does not have."""
    told: list[Any] = []

    def initialize(args: Any, **_: Any) -> None:
        told.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.deepspeed, "initialize", initialize)
    for device in ("cuda:0", "cpu"):
        with pytest.raises(KeyboardInterrupt):
            engine.Engine(torch.nn.Linear(1, 1), None, {}, World(1, 2, torch.device(device)))  # type: ignore[arg-type]
    assert told == [SimpleNamespace(device_rank=0), None]
