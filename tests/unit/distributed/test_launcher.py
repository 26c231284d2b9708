"""What each launcher's variables become; the processes that it starts, with what the real ones were seen to set."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from pretrain.distributed import launcher
from pretrain.distributed.launcher import first_host, torch_variables

HERE = "127.0.0.1"


def slurm(rank: int, local: int, size: int, **more: str) -> dict[str, str]:
    """The variables that srun sets for every task."""
    return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NTASKS": str(size), **more}


def six(rank: int, local: int, size: int, local_size: int, address: str, port: str) -> dict[str, str]:
    return dict(zip(launcher.TORCH, (str(rank), str(local), str(size), str(local_size), address, port), strict=True))


TWO_NODES = {"SLURM_JOB_ID": "40217", "SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_STEP_NUM_TASKS": "4"}
TWO_NODES |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]"}
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h"}
TORCHRUN |= {"MASTER_PORT": "5"}
DEEPSPEED = {**TORCHRUN, "LOCAL_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "1"}
del DEEPSPEED["LOCAL_WORLD_SIZE"]
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
OPEN_MPI |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        pytest.param({}, {}, id="alone"),
        pytest.param(TORCHRUN, six(1, 1, 2, 2, "h", "5"), id="torchrun"),
        pytest.param(DEEPSPEED, six(1, 1, 2, 2, "h", "5"), id="deepspeed"),
        pytest.param(OPEN_MPI, six(1, 1, 2, 2, HERE, "29500"), id="mpirun of Open MPI"),
        pytest.param(HYDRA, six(1, 1, 2, 2, HERE, "29500"), id="mpirun of MPICH or Intel"),
        pytest.param(
            {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "MASTER_ADDR": "h"},
            six(1, 0, 2, 1, "h", "29500"),
            id="mpirun over two nodes",
        ),
        pytest.param(
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", **OPEN_MPI, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            six(1, 1, 2, 2, HERE, "20007"),
            id="mpirun within a Slurm job",
        ),
        pytest.param({**slurm(0, 0, 8), **TORCHRUN}, six(1, 1, 2, 2, "h", "5"), id="torchrun within a Slurm job"),
        # srun
        pytest.param(slurm(1, 1, 2), six(1, 1, 2, 2, HERE, "29500"), id="srun, as little as it may set"),
        pytest.param(slurm(1, 1, 2, SLURM_JOB_ID="40217"), six(1, 1, 2, 2, HERE, "20217"), id="srun on one node"),
        pytest.param(
            slurm(1, 1, 2, SLURM_JOB_ID="7", SLURM_STEP_ID="2", MASTER_ADDR="h"),
            six(1, 1, 2, 2, "h", "20209"),
            id="srun, the job's third step",
        ),
        pytest.param(slurm(1, 1, 2, MASTER_PORT="4"), six(1, 1, 2, 2, HERE, "4"), id="srun, with a port of the user's"),
        pytest.param(
            {**slurm(3, 1, 4), **TWO_NODES, "SLURM_NODEID": "1"},
            six(3, 1, 4, 2, "gpu07", "20217"),
            id="srun on two nodes",
        ),
        pytest.param(
            {**slurm(2, 1, 4), **TWO_NODES, "SLURM_NODEID": "0"},
            six(1, 1, 4, 2, "gpu07", "20217"),
            id="srun --distribution=cyclic: neighbours in number are on one node all the same",
        ),
        pytest.param(
            {**slurm(1, 0, 2, SLURM_NNODES="2", SLURM_JOB_NODELIST="a,b", SLURM_TASKS_PER_NODE="8(x2)")},
            six(1, 0, 2, 1, "a", "29500"),
            id="srun of fewer tasks than the job has",
        ),
        # a process alone within a job
        pytest.param(slurm(0, 0, 1, SLURM_JOB_ID="7"), {}, id="the only task"),
        pytest.param({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, {}, id="salloc's shell"),
        pytest.param(
            slurm(0, 0, 8, SLURM_JOB_ID="7", SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="1"),
            {},
            id="salloc's shell as a step of its own",
        ),
    ],
)
def test_what_a_launcher_says(env: dict[str, str], expected: dict[str, str], monkeypatch: Any) -> None:
    monkeypatch.setattr(launcher.subprocess, "run", no_scontrol)
    assert torch_variables(env) == expected


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({**slurm(0, 0, 8), "ENVIRONMENT": "BATCH"}, r"this is the batch script, .*: start the tasks with srun"),
        (slurm(0, 0, 3, SLURM_NNODES="2"), r"srun placed 2, 1 tasks on the nodes: give --nodes and --ntasks-per-node"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, r"does not say where process 0 is: set MASTER_ADDR .*mpirun -x"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, r"mpirun did not set OMPI_COMM_WORLD_LOCAL_RANK, OMPI_COMM_WORLD_SIZE, "),
        ({"JSM_NAMESPACE_RANK": "0"}, r"^jsrun \(JSM_NAMESPACE_RANK is set\) is not known here: let .* set RANK, "),
        ({**TORCHRUN, "RANK": "one"}, r"^RANK=one, .*: must be whole numbers$"),
        ({**TORCHRUN, "WORLD_SIZE": "3"}, r"3 processes, 2 of them on this node: give all nodes one number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "5"}, r"set LOCAL_RANK, .* pretrain.launch --nodes"),
        ({**slurm(0, 0, 2), "SLURM_PTY_PORT": "1"}, r"^this is a shell of srun --pty, which has 2 tasks, .*--ntasks=1"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, r"^srun did not set SLURM_LOCALID; "),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(env: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        torch_variables(env)
    assert "\n" not in str(error.value)


def no_scontrol(*_: Any, **__: Any) -> Any:
    raise FileNotFoundError("scontrol")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("a,b", "a"),
        ("n[1-4]", "n1"),
        ("n[003-005,9]-ib,gpu1", "n003-ib"),
        ("gpu1,n[3-5]", "gpu1"),
        ("rack[1-2]n[07-08]", "rack1n07"),
    ],
)
def test_the_first_host_of_slurms_lists(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_slurm_says_a_nodes_address(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "NodeName=gpu07 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=gpu07 Version=22.05"
    asked: list[Any] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return launcher.subprocess.CompletedProcess(command, 0, stdout=shown)

    monkeypatch.setattr(launcher.subprocess, "run", run)
    env = {**slurm(3, 1, 4), **TWO_NODES, "SLURM_NODEID": "1"}
    assert torch_variables(env)["MASTER_ADDR"] == "10.0.0.7"
    assert asked == [["scontrol", "show", "--oneliner", "node", "gpu07"]]


def test_torchrun_started_by_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpirun's variables are those of torchrun's one process on the node: DeepSpeed would refuse them."""
    for name, value in {**TORCHRUN, **OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    launcher.adopt_launcher()
    assert launcher.os.environ["LOCAL_RANK"] == "1"
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in launcher.os.environ


def test_a_launcher_that_is_killed_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's processes learn of its end; those of a shell, whose user went home, go on."""
    read, write = os.pipe()
    for waiting in (True, False):
        launcher_pid = os.fork()
        if launcher_pid == 0:
            if waiting:
                os.environ["TORCHELASTIC_RUN_ID"] = "none"
            ready, tell = os.pipe()
            if os.fork() == 0:
                watch = launcher.LauncherWatch()
                before = watch.gone
                os.write(tell, b"1")
                while os.getppid() == watch._parent:
                    time.sleep(0.01)
                os.write(write, f"{before} {watch.gone};".encode())
            else:
                os.read(ready, 1)
            os._exit(0)
        os.waitpid(launcher_pid, 0)
        assert os.read(read, 100).decode() == f"False {waiting};"
