"""Disks, shared memory and GPUs that are too small, each under its real conditions."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_prep.schema import Card
from pretrain.config import Config, load
from pretrain.models import DiT
from pretrain.resilience import capacity

PAPERS = Card({"width": 4096}, {"channels": 12, "downsample": 8}, 300, "mean", [256])


def demo(*words: str) -> Config:
    return load("demo_256", ["data.path=/set", "optimizer.name=adamw", *words])[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("not root: it mounts a small file system")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


# ---- disks ----


def test_the_run_directory_must_hold_the_checkpoints(small_disk: Path, tmp_path: Path) -> None:
    """Here 3 that are kept and one that is being written, 16 bytes a parameter, less what is there."""
    config = demo(f"run_dir={small_disk}/a/run")
    (problem,) = capacity.run_dir_problems(config)
    assert problem.startswith(f"run_dir: {small_disk}/a/run has 0.0 GiB free, 0.2 GiB are needed for its checkpoints")
    there = small_disk / "a/run/checkpoints/step_1/rank"
    there.parent.mkdir(parents=True)
    with there.open("wb") as file:
        file.truncate(capacity.kept_checkpoint_bytes(config))  # a hole: it takes no space
    assert capacity.run_dir_problems(config) == []
    assert capacity.run_dir_problems(demo(f"run_dir={tmp_path}")) == []


def test_checkpoints_that_are_kept_for_ever_count() -> None:
    plain = demo("checkpoint.keep_every=0")
    last, half = capacity.kept_checkpoint_bytes(plain), plain.steps // 2
    assert plain.checkpoint.every == half  # checkpoints half-way and at the end
    assert capacity.kept_checkpoint_bytes(demo(f"checkpoint.keep_every={half}")) == last * 3 // 2


def test_a_run_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (problem,) = capacity.run_dir_problems(demo(f"run_dir={tmp_path}/file/run"))
    assert problem.endswith("/file/run cannot be written, as " + f"{tmp_path}/file is no folder")


def test_the_cache_must_hold_what_it_may_grow_to(small_disk: Path, tmp_path: Path) -> None:
    card = Card({}, {}, 300, "mean", [256], sets={"a/256": {"resolutions": [256], "bytes": 3 << 30}})
    config = demo(f"data.cache={small_disk}")
    (problem,) = capacity.cache_problems(config, card)
    assert problem.startswith(f"data.cache: {small_disk} has 0.0 GiB free, 3.0 GiB are needed")
    (problem,) = capacity.cache_problems(demo(f"data.cache={small_disk}", "data.cache_limit=2gb"), card)
    assert "2.0 GiB are needed" in problem
    assert capacity.cache_problems(demo(f"data.cache={small_disk}", "data.cache_limit=0.5mb"), card) == []
    assert capacity.cache_problems(demo(), card) == []


def test_shared_memory_must_hold_the_batches_kept_ready(small_disk: Path) -> None:
    """8 processes × 64 samples, 4 workers × 2 batches: latents 12 × 32 × 32 and 300 tokens × 4096, 2 bytes each."""
    config = demo("data.workers=4", "data.prefetch=2")
    (problem,) = capacity.shared_memory_problems(small_disk, config, PAPERS, 8 * 64)
    assert problem.startswith(f"shared memory: {small_disk} has 0.0 GiB free, 9.5 GiB are needed")
    assert capacity.shared_memory_problems(small_disk, demo("data.workers=0"), PAPERS, 8 * 64) == []


def test_states_that_no_gpu_of_this_size_holds() -> None:
    """bf16 weights whole; gradients, masters, moments and average in fp32, one share each."""
    config, deepspeed = load("stage1_256")
    assert capacity.state_bytes(config, deepspeed, 1) == 22 * 1027902120
    assert capacity.state_bytes(config, deepspeed, 8) == 8 * 1027902120
    assert capacity.memory_problems(config, deepspeed, 8, 16 << 30) == []
    (problem,) = capacity.memory_problems(config, deepspeed, 1, 16 << 30)
    assert problem.startswith("GPU memory: 16.0 GiB on a GPU, but ") and "take 21.1 GiB with 1 process" in problem


def test_muon_has_one_moment_for_its_matrices() -> None:
    (adamw, deepspeed), (muon, _) = (load("stage1_256", [f"optimizer.name={name}"]) for name in ("adamw", "muon"))
    with torch.device("meta"):
        matrices = sum(matrix.numel() for matrix in DiT(muon.model.backbone()).hidden_matrices)
    spared = capacity.states(adamw, deepspeed, 1).total - capacity.states(muon, deepspeed, 1).total
    assert spared == 4 * matrices > 2e9
    assert capacity.checkpoint_bytes(adamw) == 16 * 1027902120 == capacity.checkpoint_bytes(muon) + spared


def test_activations_grow_with_the_batch_and_shrink_with_recomputing() -> None:
    one, eight = (capacity.activation_bytes(load("stage1_256")[0], micro) for micro in (1, 8))
    assert eight == 8 * one
    assert capacity.activation_bytes(load("stage1_256", ["model.recompute=true"])[0], 1) < one / 5
