"""What a start shows, number by number."""

from __future__ import annotations

import pytest
import torch

from pretrain.config import load
from pretrain.data.epoch_plan import EpochPlan, Phase
from pretrain.distributed.world import World
from pretrain.monitoring import start_summary as module
from pretrain.monitoring.start_summary import start_summary


def plan_of(draws: dict[str, int], steps: int) -> EpochPlan:
    """Epochs of so many steps, all alike."""
    return EpochPlan(tuple(draws), steps, (Phase(0, None, draws),))


def test_a_start_on_a_cpu() -> None:
    config, deepspeed = load("demo_256", ["steps=100", "run_dir=runs/x"])
    assert start_summary(config, deepspeed, plan_of({"a": 64, "b": 16}, 2), World.alone(), 60).splitlines() == [
        "model: focusdit_tiny, 2.5M parameters, in fp32 on CPU, 1 process on 1 node",
        "data:  data/demo at 256 px, 80 samples an epoch of 2 steps",
        "batch: 32 images = 1 × 2 micro-batches of 16",
        "to go: 40 of 100 steps, 1,280 images, 16.0 epochs, by muon",
        "watch: tensorboard --logdir runs/x",
    ]


def test_a_start_on_many_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "all_gather", lambda host, world: ["a"] * 8 + ["b"] * 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    config, deepspeed = load("stage1_256", ["deepspeed.train_micro_batch_size_per_gpu=128"])
    world = World(0, 16, torch.device("cuda", 0))
    lines = start_summary(config, deepspeed, plan_of({"a": 20_480_000}, 10_000), world, 0).splitlines()
    assert (
        lines[0] == "model: focusdit_1b_shared2d, 1,027.9M parameters, in bf16 on NVIDIA H100, 16 processes on 2 nodes"
    )
    assert lines[2] == "batch: 2048 images = 16 × 1 micro-batch of 128"
    assert lines[3] == "to go: 50,000 of 50,000 steps, 102,400,000 images, 5.0 epochs, by adamw"


def test_methods_that_train_for_less_are_named_with_their_steps() -> None:
    words = [
        "steps=1000",
        "routing.name=tread",
        "alignment.weight=0.5",
        "alignment.until=0.25",
        "model.preset=dit_tiny_deep",
    ]
    config, deepspeed = load("demo_256", ["model.mask=none", "model.ffn=uniform", *words])
    lines = start_summary(config, deepspeed, plan_of({"a": 64}, 2), World.alone(), 0).splitlines()
    assert lines[3].endswith(" epochs, by muon, tread up to step 900, alignment up to step 250")
