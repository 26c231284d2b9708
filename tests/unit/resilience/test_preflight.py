"""Checks before a start: ports, clocks and GPUs under real conditions, and all problems in one list."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, SMALL

from pretrain.distributed.launcher import TORCH
from pretrain.resilience import preflight
from pretrain.resilience.preflight import ProcessReport, clock_problems, gpu_problems, merged
from pretrain.train import main

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


def report(host: str, clock: float = 0.0, gpu: str = "A100", *problems: str) -> ProcessReport:
    return ProcessReport(host, clock, gpu, problems)


def test_clocks_that_are_apart() -> None:
    assert clock_problems([report("a", 100.0), report("b", 109.0)]) == []
    (problem,) = clock_problems([report("a", 130.0), report("b", 100.0), report("c", 101.0)])
    assert problem.startswith("clocks: a is 30 s ahead of b, 10 s are allowed")


def test_gpus_of_two_kinds() -> None:
    assert gpu_problems([report("a"), report("b")]) == []
    (problem,) = gpu_problems([report("a"), report("a"), report("b", 0.0, "H100")])
    assert problem.startswith("GPUs: not all alike (A100 on a; H100 on b)")


def test_a_problem_is_told_once_with_its_hosts() -> None:
    everywhere, on_one = "batch: x", "run_dir: full"
    found = merged(
        [report("a", 0.0, "", everywhere), report("b", 0.0, "", everywhere, on_one), report("b", 0.0, "", on_one)]
    )
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
    assert "  ok       batch: 4 images = 2 processes × 1 micro-batch of 2\n" in out
    assert f"  ok       data: {data_set}, 20 samples an epoch in " in out
    assert "  not checked here: GPUs, /dev/shm, " in out and "--processes" not in out
    assert "ok       /dev/shm" not in out
    assert not (tmp_path / "run").exists()
    code, out = check(capsys, monkeypatch, *words)
    assert code == 0
    assert "the batch (give --processes N)" in out


def test_a_check_without_nodes_waits_for_few_libraries(data_set: Path, tmp_path: Path) -> None:
    script = "import sys; from pretrain.train import main; main(sys.argv[1:]); print(*sys.modules)"
    words = ["demo_256", f"data.path={data_set}", *SMALL, f"run_dir={tmp_path}/run", "--check"]
    env = {k: v for k, v in os.environ.items() if k not in TORCH}
    command = [sys.executable, "-c", script, *words]
    said = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("demo_256: 0 problems\n") and said.stderr == ""
    imported = set(said.stdout.splitlines()[-1].split())
    assert "torch" in imported
    assert imported & {"deepspeed", "streaming", "diffusers", "transformers", "torchvision", "tensorboard"} == set()


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
    assert "  ok  " not in out, "nothing is both"
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
    words.append("guard.seconds=10")  # process 0 waits for two fifths of it, so that the other can read
    finished = train("demo_256", *words, processes=2, check=False)
    assert finished.codes == [1, 1]
    told = [line for line in finished.output.splitlines() if line.startswith("  problem")]
    assert [line.split()[1] for line in told] == ["batch:", "data:", "run_dir:"]
    assert "train: process 1: not started: process 0 lists what is wrong (3 problems)\n" in finished.output


def test_what_the_node_lacks_is_told_at_the_start(data_set: Path, tmp_path: Path) -> None:
    """No compiler for model.compile, few files that may be open, a long TMPDIR: not the first step's traceback or time-out."""
    folder = tmp_path / ("x" * (105 - len(str(tmp_path)) - 1))
    folder.mkdir()
    words = ["demo_256", f"data.path={data_set}", *SMALL, f"run_dir={tmp_path}/run", "data.workers=2"]
    words += ["deepspeed.train_batch_size=16", "deepspeed.train_micro_batch_size_per_gpu=1", "model.compile=true"]
    env = {k: v for k, v in os.environ.items() if k not in (*TORCH, "CC", "CXX")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["prlimit", "--nofile=400:400", sys.executable, "-m", "pretrain.train", *words],
        cwd=ROOT,
        env=env | {"PATH": str(tmp_path), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        executable=shutil.which("prlimit"),
    )
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("  problem")]
    assert [line.split()[1] for line in told] == ["model.compile:", "TMPDIR:", "open"], done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
