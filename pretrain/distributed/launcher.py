"""The launcher that started this process, told by its variables, and torch's variables from them.

    torchrun, accelerate, slurm/*.sh   RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT: torch's own
    deepspeed                          the same, with LOCAL_SIZE in place of LOCAL_WORLD_SIZE
    mpirun (Open MPI)                  OMPI_COMM_WORLD_…
    mpirun, mpiexec (MPICH, Intel)     PMI_… and MPI_LOCAL…
    srun                               SLURM_…

The first one that is there counts: a launcher inside of a Slurm job knows more than Slurm.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# rank, local rank, processes, processes of this node
OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
HYDRA = ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS")
# Launchers whose variables are not translated, by the variable that each of their processes has.
UNKNOWN = {"JSM_NAMESPACE_RANK": "jsrun", "FLUX_TASK_RANK": "flux run", "PALS_RANKID": "PALS' aprun"}
PORT = 29500  # torch's default
LAUNCHER_PID = "FOCUSDIT_LAUNCHER_PID"  # set by pretrain.launch
# Variables of launchers that wait for their processes: whose parent, if it is gone, was killed.
WAITING = (LAUNCHER_PID, "TORCHELASTIC_RUN_ID", "CROSS_SIZE")


@dataclass(frozen=True)
class Place:
    """This process among those that the launcher started.

    Attributes:
        rank, size: its number from 0, and the number of all.
        local_rank, local_size: the same on its node.
        launcher: the launcher's name.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int
    launcher: str


def adopt_launcher() -> None:
    """Sets torch's variables of this process, where a launcher of any kind started it. Raises ValueError."""
    os.environ.update(torch_variables(os.environ))
    # mpirun may have started torchrun, once on each node: its own variables would mean torchrun's process to DeepSpeed.
    if "RANK" in os.environ and os.environ.get(OPEN_MPI[1]) != os.environ["LOCAL_RANK"]:
        os.environ.pop(OPEN_MPI[1], None)


class LauncherWatch:
    """Tells whether the launcher that waits for this process is gone: nobody else would end the processes that it leaves."""

    def __init__(self) -> None:
        self._parent = int(os.environ.get(LAUNCHER_PID, os.getppid()))
        self._waits = any(name in os.environ for name in WAITING)

    @property
    def gone(self) -> bool:
        """True once the launcher has ended, or was killed."""
        return self._waits and os.getppid() != self._parent


def torch_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Torch's six variables from those of the launcher; nothing for a process that was started alone.

    Raises:
        ValueError: the launcher is not known, set some of its variables only, or has other numbers of processes on the nodes.
    """
    place = find_place(env)
    if place is None:
        return {}
    if place.launcher == "srun" and "SLURM_STEP_ID" not in env and env.get("ENVIRONMENT") == "BATCH":
        raise ValueError(
            f"Slurm reserved {place.size} tasks, but this is the batch script, of which there is one: start the tasks with "
            "srun (srun python -m pretrain.train …), or submit slurm/stage1_256.sh; one alone: srun --ntasks=1 …"
        )
    if place.size % place.local_size:
        raise ValueError(
            f"{place.launcher} started {place.size} processes, {place.local_size} of them on this node: give all nodes "
            "one number of processes (srun: --ntasks-per-node)"
        )
    numbers = (place.rank, place.local_rank, place.size, place.local_size)
    found = dict(zip(TORCH, map(str, numbers), strict=False))
    found["MASTER_ADDR"] = env.get("MASTER_ADDR") or _address(env, place)
    found["MASTER_PORT"] = env.get("MASTER_PORT") or str(_port(env))
    return found


def find_place(env: Mapping[str, str]) -> Place | None:
    """This process among those of its launcher; None for one that was started alone."""
    if "RANK" in env or "WORLD_SIZE" in env:
        env = {**env, "LOCAL_WORLD_SIZE": env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", ""))}
        return _place(env, "the launcher", TORCH[:4], needed=TORCH)
    if OPEN_MPI[0] in env:
        return _place(env, "mpirun", OPEN_MPI)
    if HYDRA[0] in env and HYDRA[1] in env:
        return _place(env, "mpirun", HYDRA)
    if name := next((name for name in UNKNOWN if name in env), None):
        raise ValueError(
            f"{UNKNOWN[name]} ({name} is set) is not known here: let each of its processes set {', '.join(TORCH)}, or let "
            "it start python -m pretrain.launch, once on each node"
        )
    return _slurm(env) if "SLURM_PROCID" in env else None


def _place(env: Mapping[str, str], launcher: str, names: tuple[str, ...], needed: tuple[str, ...] = ()) -> Place:
    if missing := [name for name in needed or names if not env.get(name)]:
        raise ValueError(
            f"{launcher} did not set {', '.join(missing)}; torchrun and slurm/*.sh set all that is needed. Where RANK counts "
            "nodes, as Kubernetes' jobs do, let each start python -m pretrain.launch --nodes $WORLD_SIZE --node-rank $RANK "
            "--address $MASTER_ADDR:$MASTER_PORT"
        )
    try:
        rank, local_rank, size, local_size = (int(env[name]) for name in names)
    except ValueError as error:
        raise ValueError(f"{', '.join(f'{n}={env[n]}' for n in names)}: must be whole numbers") from error
    return Place(rank, local_rank, size, local_size, launcher)


# ---- Slurm ----


def _slurm(env: Mapping[str, str]) -> Place | None:
    """The place of a task of srun; None for the only one, such as a shell of `srun --pty bash`."""
    size = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    if size == 1:
        return None
    if "SLURM_PTY_PORT" in env:
        raise ValueError(
            f"this is a shell of srun --pty, which has {size} tasks, and only the first has the shell: take --ntasks=1, or "
            "salloc and then srun python -m pretrain.train …; in this shell python -m pretrain.launch starts them all"
        )
    if "SLURM_LOCALID" not in env:
        raise ValueError("srun did not set SLURM_LOCALID; torchrun and slurm/*.sh set all that is needed")
    counts = _tasks_per_node(env, size)
    if len(set(counts)) > 1:
        raise ValueError(
            f"srun placed {', '.join(map(str, counts))} tasks on the nodes: give --nodes and --ntasks-per-node, so that all "
            "nodes have one number"
        )
    local_rank, per_node = int(env["SLURM_LOCALID"]), counts[0]
    node = int(env.get("SLURM_NODEID") or int(env["SLURM_PROCID"]) // per_node)
    # Not SLURM_PROCID: with --distribution=cyclic neighbours in number are on other nodes.
    rank = node * per_node + local_rank if len(counts) > 1 else int(env["SLURM_PROCID"])
    return Place(rank, local_rank, size, per_node, "srun")


def _tasks_per_node(env: Mapping[str, str], size: int) -> list[int]:
    """The number of tasks on each node, from 8(x4) or 2,1; evenly over the nodes where Slurm does not say it."""
    words = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    counts = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", words) for _ in range(int(times or 1))]
    if sum(counts) == size:
        return counts
    nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or env.get("SLURM_JOB_NUM_NODES") or 1)
    return [size // nodes + (node < size % nodes) for node in range(nodes)]


def _address(env: Mapping[str, str], place: Place) -> str:
    """The address of the node of process 0."""
    if place.size == place.local_size:
        return "127.0.0.1"
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    if not nodes:
        raise ValueError(
            f"{place.launcher} does not say where process 0 is: set MASTER_ADDR to its node's address for all processes"
            " (mpirun -x MASTER_ADDR=…)"
        )
    first = first_host(nodes)
    try:  # the address that Slurm itself uses: the name need not resolve
        command = ["scontrol", "show", "--oneliner", "node", first]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):  # in a container without Slurm's commands
        return first
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    return found[1] if found else first


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: n[003-005,9]-ib,gpu1 begins with n003-ib."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _port(env: Mapping[str, str]) -> int:
    """A port that all processes of this start agree on: of the job and its step, below those that the kernel gives out."""
    if job := env.get("SLURM_JOB_ID"):
        step = env.get("SLURM_STEP_ID", "0")
        return 20000 + (int(job) + 101 * (int(step) if step.isdigit() else 0)) % 10000
    return PORT
