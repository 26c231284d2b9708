"""Real launchers with real trainings: which processes they start, signals to them and to one process, and their own deaths."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import ROOT, SMALL, free_port, wait_for_line

from pretrain.checkpoint.reader import newest
from pretrain.distributed.launcher import TORCH
from pretrain.resilience.signals import REQUEUE

# More steps than any of these tests waits for.
WORDS = (*SMALL, "checkpoint.every=2", "checkpoint.keep_every=0", "guard.seconds=15", "steps=100000")


@pytest.fixture
def start(data_set: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a launcher with a training in tmp_path/run; all write to tmp_path/log."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*command: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", *command, "demo_256", *WORDS]
        words += [f"data.path={data_set}", f"run_dir={tmp_path / 'run'}"]
        env = {k: v for k, v in os.environ.items() if k not in TORCH} | {"OMP_NUM_THREADS": "1"}
        with (tmp_path / "log").open("ab") as log:
            started.append(subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log))
        return started[-1]

    yield run
    for pid in [*(process.pid for process in started if process.poll() is None), *trainings(tmp_path)]:
        os.kill(pid, signal.SIGKILL)
    for process in started:
        process.wait()


def trainings(folder: Path) -> list[int]:
    """The processes that train in this folder, their loaders' too, whoever is their parent."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        launchers = {b"pretrain.launch", b"torch.distributed.run"}
        if f"run_dir={folder / 'run'}".encode() in words and not launchers.intersection(words):
            found.append(int(path.parent.name))
    return found


def worker(launcher: subprocess.Popen[bytes], rank: int) -> int:
    """A launcher's training process of this rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(
        int(c) for c in children if f"RANK={rank}".encode() in Path(f"/proc/{c}/environ").read_bytes().split(b"\0")
    )


def wait_for_end(folder: Path, seconds: float = 200) -> None:
    """Until no process trains in this folder any more."""
    deadline = time.monotonic() + seconds
    while left := trainings(folder):
        assert time.monotonic() < deadline, f"orphans: {left}\n{(folder / 'log').read_text()}"
        time.sleep(0.1)


def stopped_at(folder: Path, by: str) -> int:
    """The step after which the log says that the training was stopped by this; the newest checkpoint has it."""
    (step,) = re.findall(rf"stopped by {by} \(process [01, ]+\) after step (\d+)", (folder / "log").read_text())
    found = newest(folder / "run")
    assert found is not None and found.run_state.step == int(step)
    found.verify()
    return int(step)


def test_our_launcher_goes_on_after_a_loss_and_ends_with_75_when_asked(start, tmp_path: Path) -> None:
    """A killed process, then a signal to the launcher, as after Ctrl-C: one line, no traceback, no orphan."""
    log = tmp_path / "log"
    launcher = start("pretrain.launch", "--processes", "2", "--restarts", "1")
    wait_for_line(log, "step_00000002\n")  # a whole checkpoint: it is written in the background
    os.kill(worker(launcher, 1), signal.SIGKILL)
    wait_for_line(log, "launch: ended with code 137; starting again (1 of 1 restarts left)")
    wait_for_line(log, "going on from")
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(200) == REQUEUE, log.read_text()
    assert stopped_at(tmp_path, "SIGUSR1") > 2
    assert "Traceback" not in log.read_text()
    wait_for_end(tmp_path, 0)


def test_torchruns_own_restarts_go_on_and_its_end_leaves_a_checkpoint(start, tmp_path: Path) -> None:
    """A signal to one process, and SIGTERM to torchrun, which passes it on; its own exit code is 1 for any reason."""
    log = tmp_path / "log"
    torchrun = start(
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
        "--max-restarts=1",
        "-m",
        "pretrain.train",
    )
    wait_for_line(log, "step_00000002\n")  # a whole checkpoint: it is written in the background
    os.kill(worker(torchrun, 1), signal.SIGUSR1)
    wait_for_line(log, "going on from")
    step = stopped_at(tmp_path, "SIGUSR1")
    wait_for_line(log, f"step {step + 1}/")
    torchrun.send_signal(signal.SIGTERM)
    assert torchrun.wait(200) == 1
    assert stopped_at(tmp_path, "SIGTERM") > step
    wait_for_end(tmp_path, 0)


def test_processes_stop_with_a_checkpoint_when_torchrun_is_killed(start, tmp_path: Path) -> None:
    """SIGUSR1 kills torchrun itself, which does not listen to it."""
    torchrun = start(
        "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m", "pretrain.train"
    )
    wait_for_line(tmp_path / "log", "step 1/")
    torchrun.send_signal(signal.SIGUSR1)
    assert torchrun.wait(200) == -signal.SIGUSR1
    wait_for_end(tmp_path)
    assert stopped_at(tmp_path, "the end of its launcher") >= 1


@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed", "torch.distributed.launch"])
def test_launchers_of_libraries(launcher: str, data_set: Path, tmp_path: Path) -> None:
    """As their users start them: DeepSpeed's and torch's older one add --local_rank=N to the command."""
    program = tmp_path / "train.py"
    # DeepSpeed's names GPUs that are not there, which pretrain.train refuses.
    forget = "import os, sys\nos.environ.pop('CUDA_VISIBLE_DEVICES', None)\n"
    program.write_text(f"{forget}from pretrain.train import main\nsys.exit(main())\n")
    port = str(free_port())
    folder = Path(sys.executable).parent
    command = {
        "accelerate": [
            folder / "accelerate",
            "launch",
            "--multi_gpu",
            "--num_processes=2",
            f"--main_process_port={port}",
        ],
        "deepspeed": [folder / "deepspeed", "--num_gpus=2", f"--master_port={port}"],
        "torch.distributed.launch": [
            sys.executable,
            "-m",
            "torch.distributed.launch",
            "--nproc-per-node=2",
            f"--master-port={port}",
        ],
    }[launcher]
    words = [*map(str, command), str(program), "demo_256", *WORDS, "steps=2"]
    words += [f"data.path={data_set}", f"run_dir={tmp_path / 'run'}"]
    env = {k: v for k, v in os.environ.items() if k not in TORCH} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("demo_256 is complete: 2 steps, 8 images") == 1, done.stdout
    found = newest(tmp_path / "run")
    assert found is not None and found.state["world"] == 2


# As root a UID without a passwd entry keeps the right to read the checkout; others need a namespace for another UID.
UNNAMED = (
    ["setpriv", "--reuid=54321", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    if os.geteuid() == 0
    else ["unshare", "--user", "--map-user=54321"]
)


def test_a_user_without_a_name(data_set: Path) -> None:
    """A container's UID that has no passwd entry; torch asks for the user's name while it is imported."""
    env = {k: v for k, v in os.environ.items() if k not in (*TORCH, "USER", "LOGNAME", "LNAME", "USERNAME")}
    words = [*UNNAMED, sys.executable, "-m", "pretrain.train", "demo_256", *WORDS, f"data.path={data_set}", "--check"]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        done = subprocess.run([*words, f"run_dir={folder}/run"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("demo_256: 0 problems\n")
