"""A stage's job comes back by itself where going on helps, and ends where it does not; on a real two-node cluster.

The scripts' PYTHON is a small program that ends as training would: 75 after a checkpoint, 1 after an error. `start` is
the number of the job's start, `rank` the task's, and `record` a folder for its notes.
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0")
STAGE = "slurm/stage1_256.sh"
START_AND_RANK = """
start, rank = int(os.environ.get("SLURM_RESTART_COUNT", 0)) + 1, int(os.environ["RANK"])
def after_the_other():
    if rank: # the first to end, however late it started
        (record / "ends").touch()
    while not (record / "ends").exists():
        time.sleep(0.05)
    time.sleep(1 - rank)
"""
# Ends with 75 on USR1, as training does once it has a checkpoint, all tasks together: srun kills those that are left. In its
# first start only, the next one runs through.
STOPPABLE = """
    import signal
    def stop(number, frame):
        (record / f"signal-{number}-{rank}").touch()
        while not (record / f"signal-{number}-{1 - rank}").exists():
            time.sleep(0.05)
        sys.exit(75)
    signal.signal(signal.SIGUSR1, stop)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (record / f"ready-{start}-{rank}").touch()
    if start == 1:
        time.sleep(100)
"""


@pytest.fixture
def submit(cluster, program) -> Callable[..., str]:
    """Submit a stage whose tasks are the program; returns the job's id."""

    def run(body: str, *options: str, **env: str) -> str:
        python = program(f"{START_AND_RANK}{textwrap.dedent(body)}")
        return cluster.sbatch(STAGE, *TWO_NODES, *options, env={"PYTHON": python, **env})

    return run


@pytest.fixture
def notes(tmp_path: Path) -> Callable[[], set[str]]:
    """The names of what the tasks noted."""
    return lambda: {p.name for p in (tmp_path / "record").iterdir()}


def starts(log: str) -> int:
    return len(re.findall(r"^job \d+, start \d+: ", log, re.MULTILINE))


def wait_for(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def come_back(cluster, job: str, timeout: float = 60) -> str:
    """Starts the job again once it is back in the queue, and expects its success. Returns its log."""
    cluster.start_requeued(job, timeout=timeout)
    result = cluster.wait(job)
    assert (result.state, result.exit_code) == ("COMPLETED", 0), result.log
    assert cluster.show(job)[0]["Restarts"] == "1"
    assert starts(result.log) == 2
    return result.log


# ---- what a task's end means ----


@pytest.mark.parametrize(
    "first_end",
    [
        "sys.exit(75)",  # all tasks at once
        "time.sleep(2 * rank); sys.exit(75)",  # one is killed by srun before it can say so
        "sys.exit(75) if rank else os.kill(os.getpid(), 19)",  # one is stopped: it can only be killed
        "os.kill(os.getpid(), 9) if rank else time.sleep(100)",  # one is killed, as by the kernel for its memory
        "after_the_other(); os.kill(os.getpid(), 11) if rank else sys.exit(1)",  # a crash, and what it does to others
    ],
)
def test_a_job_that_can_go_on_comes_back(cluster, submit, first_end: str) -> None:
    job = submit(f"""
    if start == 1:
        {first_end}
    """)
    assert "back into the queue" in come_back(cluster, job)


@pytest.mark.parametrize(
    "end",
    [
        "sys.exit(1)",
        "after_the_other(); sys.exit(1 if rank else 75)",  # an error in one, and the watchdog of the other
    ],
)
def test_an_error_ends_the_job_with_its_code(cluster, submit, end: str) -> None:
    result = cluster.wait(submit(end))
    assert (result.state, result.exit_code) == ("FAILED", 1), result.log
    assert starts(result.log) == 1


def test_a_job_that_always_stops_ends_at_its_limit(cluster, submit) -> None:
    job = submit("sys.exit(75)", MAX_REQUEUES="1")
    cluster.start_requeued(job)
    result = cluster.wait(job)
    assert (result.state, result.exit_code) == ("FAILED", 75), result.log
    assert f"error: job {job} ended with code 75 after 1 requeues, which is MAX_REQUEUES: it stops here" in result.log
    assert starts(result.log) == 2


# ---- signals ----


@pytest.mark.parametrize(
    "signal",
    [
        ["--signal=USR1"],  # to the tasks
        ["--signal=TERM", "--batch"],  # to the batch shell alone, which passes it on
        ["--signal=USR1", "--batch"],
    ],
)
def test_a_signal_reaches_every_task(cluster, submit, notes, signal: list[str]) -> None:
    job = submit(STOPPABLE)
    wait_for(lambda: {"ready-1-0", "ready-1-1"} <= notes())
    cluster.command("scancel", *signal, job)
    come_back(cluster, job)
    assert notes() >= {"signal-10-0", "signal-10-1"}


def test_the_tasks_are_told_before_the_time_limit(cluster, submit, notes) -> None:
    """`--signal=USR1@300` of the scripts; Slurm looks at limits once in a while, so 300 s before 5 minutes is soon."""
    job = submit(STOPPABLE, "--time=5")
    cluster.start_requeued(job, timeout=100)
    wait_for(lambda: {"signal-10-0", "signal-10-1"} <= notes())
    cluster.command("scancel", job)


def test_a_cancelled_job_stays_cancelled(cluster, submit, notes) -> None:
    job = submit("""
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (record / f"ready-{rank}").touch()
    time.sleep(100)
    """)
    wait_for(lambda: {"ready-0", "ready-1"} <= notes())
    cluster.command("scancel", job)
    result = cluster.wait(job)
    assert result.state == "CANCELLED"
    assert starts(result.log) == 1 and "back into the queue" not in result.log


def test_a_person_s_requeue_is_not_done_twice(cluster, submit, notes) -> None:
    job = submit("""
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (record / f"ready-{start}-{rank}").touch()
    if start == 1:
        time.sleep(100)
    """)
    wait_for(lambda: {"ready-1-0", "ready-1-1"} <= notes())
    cluster.command("scontrol", "requeue", job)
    assert "back into the queue" not in come_back(cluster, job)


# ---- nodes ----


@pytest.mark.parametrize("node", ["n1", "n2"])  # the batch shell's own, and another
def test_a_job_outlives_a_node(cluster, submit, notes, node: str) -> None:
    job = submit("""
    (record / f"ready-{start}-{rank}").touch()
    if start == 1:
        time.sleep(300)
    """)
    wait_for(lambda: {"ready-1-0", "ready-1-1"} <= notes())
    cluster.kill_node(node)
    wait_for(lambda: cluster.show(job)[0]["Restarts"] == "1", timeout=120)  # by Slurm itself, once it has noticed
    cluster.start_node(node)
    come_back(cluster, job)
