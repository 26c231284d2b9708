"""What is looked at before a start: each problem under its real conditions, and all of them in one list."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, SMALL

from data_prep.schema import Card
from pretrain.config import Config, load
from pretrain.resilience import preflight
from pretrain.resilience.preflight import Seen, clock_problems, gpu_problems, merged
from pretrain.train import main

PAPERS = Card({"width": 4096}, {"channels": 12, "downsample": 8}, 300, "mean", [256])


def demo(*words: str) -> Config:
    return load("demo_256", ["data.path=/set", *words])[0]


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
    (problem,) = preflight.run_dir_problems(config)
    assert problem.startswith(f"run_dir: {small_disk}/a/run has 0.0 GiB free, 0.2 GiB are needed for its checkpoints")
    there = small_disk / "a/run/checkpoints/step_1/rank"
    there.parent.mkdir(parents=True)
    with there.open("wb") as file:
        file.truncate(preflight.checkpoint_bytes(config))  # a hole: it takes no space
    assert preflight.run_dir_problems(config) == []
    assert preflight.run_dir_problems(demo(f"run_dir={tmp_path}")) == []


def test_checkpoints_that_are_kept_for_ever_count() -> None:
    last = preflight.checkpoint_bytes(demo("checkpoint.keep_every=0"))
    # of 930 steps there are checkpoints at 310, 620, 930
    assert preflight.checkpoint_bytes(demo("checkpoint.keep_every=620")) == last * 5 // 4


def test_a_run_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (problem,) = preflight.run_dir_problems(demo(f"run_dir={tmp_path}/file/run"))
    assert problem.endswith("/file/run cannot be written, as " + f"{tmp_path}/file is no folder")


def test_the_cache_must_hold_what_it_may_grow_to(small_disk: Path, tmp_path: Path) -> None:
    card = Card({}, {}, 300, "mean", [256], sets={"a/256": {"resolutions": [256], "bytes": 3 << 30}})
    config = demo(f"data.cache={small_disk}")
    (problem,) = preflight.cache_problems(config, card)
    assert problem.startswith(f"data.cache: {small_disk} has 0.0 GiB free, 3.0 GiB are needed")
    (problem,) = preflight.cache_problems(demo(f"data.cache={small_disk}", "data.cache_limit=2gb"), card)
    assert "2.0 GiB are needed" in problem
    assert preflight.cache_problems(demo(f"data.cache={small_disk}", "data.cache_limit=0.5mb"), card) == []
    assert preflight.cache_problems(demo(), card) == []


def test_shared_memory_must_hold_the_batches_kept_ready(small_disk: Path) -> None:
    """8 processes × 64 samples, 4 workers × 2 batches: latents 12 × 32 × 32 and 300 tokens × 4096, 2 bytes each."""
    config = demo("data.workers=4", "data.prefetch=2")
    (problem,) = preflight.shared_memory_problems(small_disk, config, PAPERS, 8 * 64)
    assert problem.startswith(f"shared memory: {small_disk} has 0.0 GiB free, 9.5 GiB are needed")
    assert preflight.shared_memory_problems(small_disk, demo("data.workers=0"), PAPERS, 8 * 64) == []


# ---- network, GPUs, clocks ----


def test_a_port_that_is_taken() -> None:
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = s.getsockname()[1]
        (problem,) = preflight.port_problems(port)
        assert problem.startswith(f"MASTER_PORT: {port} cannot be had on ")
    assert preflight.port_problems(port) == []


def test_a_rendezvous_that_fails_is_told_in_one_line(data_set: Path) -> None:
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = str(s.getsockname()[1])
        launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        command = [sys.executable, "-m", "pretrain.train", "demo_256", f"data.path={data_set}"]
        environment = os.environ | launcher | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"train: no rendezvous at 127.0.0.1:{port} (" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_node_whose_gpus_do_not_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "97,98")
    assert main(["demo_256"]) == 1
    assert "train: CUDA_VISIBLE_DEVICES=97,98 names GPUs, but torch finds none on " in capsys.readouterr().err


def test_states_that_no_gpu_of_this_size_holds() -> None:
    """bf16 weights whole; gradients, masters, moments and average in fp32, one share each."""
    config, deepspeed = load("stage1_256")
    assert preflight.state_bytes(config, deepspeed, 1) == 22 * 1027902120
    assert preflight.state_bytes(config, deepspeed, 8) == 4.5 * 1027902120
    assert preflight.memory_problems(config, deepspeed, 8, 16 << 30) == []
    (problem,) = preflight.memory_problems(config, deepspeed, 1, 16 << 30)
    assert problem.startswith("GPU memory: 16.0 GiB on a GPU, but ") and "take 21.1 GiB with 1 processes" in problem


def test_activations_grow_with_the_batch_and_shrink_with_recomputing() -> None:
    one, eight = (preflight.activation_bytes(load("stage1_256")[0], micro) for micro in (1, 8))
    assert eight == 8 * one
    assert preflight.activation_bytes(load("stage1_256", ["model.recompute=true"])[0], 1) < one / 5


def seen(host: str, clock: float = 0.0, gpu: str = "A100", *problems: str) -> Seen:
    return Seen(host, clock, gpu, problems)


def test_clocks_that_are_apart() -> None:
    assert clock_problems([seen("a", 100.0), seen("b", 109.0)]) == []
    (problem,) = clock_problems([seen("a", 130.0), seen("b", 100.0), seen("c", 101.0)])
    assert problem.startswith("clocks: a is 30 s ahead of b, 10 s are allowed")


def test_gpus_of_two_kinds() -> None:
    assert gpu_problems([seen("a"), seen("b")]) == []
    (problem,) = gpu_problems([seen("a"), seen("a"), seen("b", 0.0, "H100")])
    assert problem.startswith("GPUs: not all alike (A100 on a; H100 on b)")


def test_a_problem_is_told_once_with_its_hosts() -> None:
    everywhere, on_one = "batch: x", "run_dir: full"
    found = merged([seen("a", 0.0, "", everywhere), seen("b", 0.0, "", everywhere, on_one), seen("b", 0.0, "", on_one)])
    assert found == [everywhere, "run_dir: full (on b)"]


# ---- all of it ----


def check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    """`--check` without a launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    code = main([*words, "--check"])
    return code, capsys.readouterr().out


def test_a_check_without_nodes(capsys, monkeypatch, data_set: Path, tmp_path: Path) -> None:
    words = ["demo_256", f"data.path={data_set}", *SMALL, f"run_dir={tmp_path}/run"]
    code, out = check(capsys, monkeypatch, *words, "--processes", "2")
    assert code == 0
    assert "demo_256: 0 problems\n" in out
    assert "  ok       batch: 4 images = 2 processes × 1 micro-batches of 2\n" in out
    assert f"  ok       data: {data_set}, 20 samples an epoch in " in out
    assert "  not looked at here: GPUs, " in out and "--processes" not in out
    assert not (tmp_path / "run").exists()
    code, out = check(capsys, monkeypatch, *words)
    assert code == 0
    assert "the batch (give --processes N)" in out


def test_a_check_tells_all_problems_at_once(capsys, monkeypatch, data_set: Path, tmp_path: Path) -> None:
    broken, port_holder = tmp_path / "set", socket.socket()
    shutil.copytree(data_set, broken)
    shard = next(broken.rglob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "file").touch()
    words = [f"data.path={broken}", "data.damaged_shards=0", *SMALL, f"run_dir={tmp_path}/file/run"]
    with port_holder:
        port_holder.bind(("", 0))
        port_holder.listen()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("MASTER_PORT", str(port_holder.getsockname()[1]))
        assert main(["demo_256", *words, "--check", "--processes", "3"]) == 1
    out = capsys.readouterr().out
    assert "demo_256: 4 problems\n" in out
    starts = [line.split()[1] for line in out.splitlines() if line.startswith("  problem")]
    assert starts == ["batch:", "data:", "run_dir:", "MASTER_PORT:"]
    assert f"{shard.relative_to(broken)}: " in out


def test_a_check_tells_what_is_wrong_in_the_config(capsys, monkeypatch) -> None:
    code, out = check(capsys, monkeypatch, "demo_256", "data.pat=x", "optimizer.lr=-1")
    assert code == 1
    assert "demo_256: 2 problems\n  problem  config: data.pat: unknown field" in out
    assert "\n  problem  config: optimizer.lr: " in out


def test_processes_look_together(train, data_set: Path, tmp_path: Path) -> None:
    words = [f"data.path={data_set}", *SMALL, f"run_dir={tmp_path}/run", "--check"]
    output = train("demo_256", *words, processes=2).output
    assert output.count("demo_256: 0 problems\n") == 1
    assert "  ok       network: 4 MiB summed over 2 processes in " in output
    assert "  ok       GPUs: none; training runs on the CPUs\n" in output


def test_a_start_is_refused_with_every_problem_once(train, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = [f"data.path={tmp_path}/none", *SMALL, f"run_dir={tmp_path}/file/run", "deepspeed.train_batch_size=5"]
    finished = train("demo_256", *words, processes=2, check=False)
    assert finished.codes == [1, 1]
    told = [line for line in finished.output.splitlines() if line.startswith("  problem")]
    assert [line.split()[1] for line in told] == ["batch:", "data:", "run_dir:"]
    assert "train: process 1: not started: process 0 tells what is wrong (3)\n" in finished.output
