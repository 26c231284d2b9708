"""slurm/*.sh on a real two-node cluster: everything but the training itself.

The scripts' PYTHON is a program that writes down how it was started: what a rank or a worker is told is read there.
"""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

REPO = Path(__file__).parents[2]
STAGES = ["slurm/stage1_256.sh", "slurm/stage2_512.sh", "slurm/stage3_finetune.sh"]
SCRIPTS = sorted(p.relative_to(REPO).as_posix() for p in (REPO / "slurm").glob("*.sh"))
ONE_TASK_A_NODE = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0"]
SMALL_WORKER = ["--cpus-per-task=1", "--mem=0"]


def expect(result, state: str = "COMPLETED", exit_code: int = 0):
    assert (result.state, result.exit_code) == (state, exit_code), result.log


# --- one task a GPU


@pytest.mark.parametrize("script", STAGES)
def test_a_stage_runs_one_task_on_each_of_two_nodes(cluster, recorder, script):
    env = {"PYTHON": recorder.path, "CONFIG": "demo_256", "OVERRIDES": " a.b=1  c=/x/* ", "RUN_DIR": "runs/here"}
    job = cluster.sbatch(script, *ONE_TASK_A_NODE, env=env)
    result = cluster.wait(job)
    expect(result)
    tasks = sorted((n["env"] for n in recorder.notes()), key=lambda e: int(e["RANK"]))
    assert [t["RANK"] for t in tasks] == ["0", "1"]
    assert [t["SLURMD_NODENAME"] for t in tasks] == ["n1", "n2"]
    for task in tasks:
        told = {k: task[k] for k in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        assert told == {
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(20000 + int(job)),
        }
        assert task["OMP_NUM_THREADS"] == "2"  # a node's CPUs over its tasks
        assert task["PYTHONFAULTHANDLER"] == task["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
        assert "LOCAL_SIZE" not in task
    assert tasks[0]["TMPDIR"] != tasks[1]["TMPDIR"]
    for note in recorder.notes():
        assert note["arguments"] == ["-m", "pretrain.train", "demo_256", "a.b=1", "c=/x/*", "run_dir=runs/here"]


def test_two_tasks_on_one_node_share_its_gpus(cluster, recorder):
    options = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2"]
    result = cluster.wait(cluster.sbatch("slurm/stage1_256.sh", *options, env={"PYTHON": recorder.path}))
    expect(result)
    tasks = sorted((n["env"] for n in recorder.notes()), key=lambda e: int(e["RANK"]))
    assert [(t["RANK"], t["LOCAL_RANK"], t["LOCAL_WORLD_SIZE"], t["WORLD_SIZE"]) for t in tasks] == [
        ("0", "0", "2", "2"),
        ("1", "1", "2", "2"),
    ]
    # Each task sees all of the node's GPUs and takes the one of its LOCAL_RANK.
    assert [(t["CUDA_VISIBLE_DEVICES"], t["OMP_NUM_THREADS"]) for t in tasks] == [("0,1", "1")] * 2
    assert [t["SLURM_CPU_BIND_TYPE"] for t in tasks] == ["none"] * 2  # they bind themselves, by their GPUs


def test_a_stage_runs_by_its_own_config_where_slurm_knows_no_gpus(cpu_cluster, recorder):
    job = cpu_cluster.sbatch("slurm/stage2_512.sh", *ONE_TASK_A_NODE, env={"PYTHON": recorder.path})
    expect(cpu_cluster.wait(job))
    assert [n["arguments"] for n in recorder.notes()] == [["-m", "pretrain.train", "stage2_512"]] * 2


def test_tasks_get_the_rendezvous_whatever_sbatch_exports(cluster, recorder):
    options = [*ONE_TASK_A_NODE, "--export=PYTHON,CONFIG", "--cpus-per-task=2"]
    env = {"PYTHON": recorder.path, "CONFIG": "demo_256", "OMP_NUM_THREADS": "7"}
    expect(cluster.wait(cluster.sbatch("slurm/stage1_256.sh", *options, env=env)))
    assert [n["env"]["WORLD_SIZE"] for n in recorder.notes()] == ["2", "2"]
    assert [n["env"]["OMP_NUM_THREADS"] for n in recorder.notes()] == ["2", "2"]  # 7 was not exported


def test_torch_reduces_over_two_nodes(cluster, program):
    python = program("""
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor([10.0 ** dist.get_rank()])
        dist.all_reduce(total)
        print("sum", total.item(), flush=True)
        dist.destroy_process_group()
    """)
    result = cluster.wait(cluster.sbatch("slurm/stage1_256.sh", *ONE_TASK_A_NODE, env={"PYTHON": python}))
    expect(result)
    assert {"0: sum 11.0", "1: sum 11.0"} <= set(result.log.splitlines())


def test_a_dying_task_ends_the_job_with_its_exit_code(cluster, program):
    python = program("""
        if os.environ["RANK"] == "1":
            sys.exit(3)
        time.sleep(600)
    """)
    result = cluster.wait(cluster.sbatch("slurm/stage1_256.sh", *ONE_TASK_A_NODE, env={"PYTHON": python}))
    expect(result, "FAILED", 3)
    assert "task 1: Exited with exit code 3" in result.log


def test_a_requeued_job_starts_again_and_adds_to_its_log(cluster, program):
    python = program("""
        if "SLURM_RESTART_COUNT" not in os.environ:
            (record / "running").touch()
            time.sleep(600)
    """)
    job = cluster.sbatch("slurm/stage1_256.sh", *ONE_TASK_A_NODE, env={"PYTHON": python})
    running = Path(python).parent / "record" / "running"
    wait_for(running.exists)
    cluster.command("scontrol", "requeue", job)
    cluster.start_requeued(job)
    result = cluster.wait(job)
    expect(result)
    assert re.findall(rf"^job {job}, start (\d)", result.log, re.MULTILINE) == ["1", "2"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=1"], "2 tasks but 1 GPUs a node"),
        (["--nodes=2", "--ntasks=3", "--ntasks-per-node=2", "--gpus-per-node=0"], "3 tasks do not fit 2 nodes evenly"),
        (["--chdir=/", *ONE_TASK_A_NODE], "no slurm/common.sh in /: submit from the repository's root"),
    ],
)
def test_a_stage_that_cannot_work_is_refused_in_one_line(cluster, recorder, options, error):
    result = cluster.wait(cluster.sbatch("slurm/stage1_256.sh", *options, env={"PYTHON": recorder.path}))
    expect(result, "FAILED", 2)
    (line,) = result.log.splitlines()
    assert line.startswith("error: ") and error in line
    assert recorder.notes() == []


# --- encoding


ENCODE = {"INPUT": "/tars", "OUTPUT": "/shards"}
ENCODE_ARGUMENTS = [
    *["data_prep/encode.py", "--input", "/tars", "--output", "/shards"],
    *["--encoders", "flan-t5-xxl+mochi", "--resolutions", "256", "512"],
]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--array=0-2"], 3),
        (["--array=4,6"], 2),
        ([], 1),
        (["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"], 4),
    ],
)
def test_each_task_is_one_worker(cluster, recorder, options, count):
    """Of an array, or of one job: all are told the same, and share the tars through the output."""
    job = cluster.sbatch("slurm/encode.sh", *SMALL_WORKER, *options, env={"PYTHON": recorder.path, **ENCODE})
    expect(cluster.wait(job))
    assert [note["arguments"] for note in recorder.notes()] == [ENCODE_ARGUMENTS] * count
    gpus = [len(note["env"]["CUDA_VISIBLE_DEVICES"].split(",")) for note in recorder.notes()]
    assert set(gpus) == {2 if count == 4 else 1}
    if count == 4:  # each takes the GPU of its SLURM_LOCALID
        assert sorted(note["env"]["SLURM_LOCALID"] for note in recorder.notes()) == ["0", "0", "1", "1"]


def test_a_worker_that_dies_leaves_the_others_at_work(cluster, program):
    python = program("""
        if os.environ["SLURM_PROCID"] == "0":
            sys.exit(3)
        time.sleep(2)
        (record / "through").touch()
    """)
    options = [*SMALL_WORKER, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
    result = cluster.wait(cluster.sbatch("slurm/encode.sh", *options, env={"PYTHON": python, **ENCODE}))
    assert result.state == "FAILED"
    assert (Path(python).parent / "record" / "through").exists()


@pytest.mark.parametrize("absent", ["INPUT", "OUTPUT"])
def test_encoding_without_its_folders_is_refused(cluster, recorder, absent):
    env = {"PYTHON": recorder.path, **ENCODE, absent: ""}
    result = cluster.wait(cluster.sbatch("slurm/encode.sh", *SMALL_WORKER, env=env))
    expect(result, "FAILED", 2)
    (line,) = result.log.splitlines()
    assert line.startswith(f"error: {absent} is not set")
    assert recorder.notes() == []


def test_encoding_runs_without_slurm_and_hands_its_options_on(cluster, recorder):
    env = {
        "PYTHON": recorder.path,
        "INPUT": "/my tars",
        "OUTPUT": "s3://b/s",
        "WORK": "/w",
        "ENCODERS": "tiny",
        "RESOLUTIONS": "64",
        "FILTER": "aesthetic > 5",
        "OVERRIDES": "--buckets",
    }
    cluster.command("bash", "slurm/encode.sh", env=env)
    (note,) = recorder.notes()
    assert note["arguments"] == [
        *["data_prep/encode.py", "--input", "/my tars", "--output", "s3://b/s", "--work", "/w", "--encoders", "tiny"],
        *["--resolutions", "64", "--filter", "aesthetic > 5", "--buckets"],
    ]


# --- evaluation

EVALUATION = {"RUN": "runs/one", "PROMPTS": "p.txt", "METRICS": " shapes  fid ", "OUT": "out"}
HANDED_ON = [
    "-m",
    "pretrain.evaluate",
    "--run",
    "runs/one",
    "--prompts",
    "p.txt",
    "--metrics",
    "shapes",
    "fid",
    "--out",
]


@pytest.mark.parametrize("absent", EVALUATION)
def test_evaluation_without_what_it_needs_is_refused(cluster, recorder, absent):
    env = EVALUATION | {"PYTHON": recorder.path, absent: ""}
    done = cluster.command("bash", "slurm/evaluate.sh", env=env, check=False)
    assert (done.returncode, recorder.notes()) == (2, [])
    assert done.stderr.startswith(f"error: {absent} is not set: ") and done.stderr.count("\n") == 1


def test_evaluation_runs_without_slurm_and_hands_its_options_on(cluster, recorder):
    env = EVALUATION | {"PYTHON": recorder.path, "EVERY": "50", "OVERRIDES": "--steps 20  --per-prompt 4"}
    cluster.command("bash", "slurm/evaluate.sh", env=env)
    (note,) = recorder.notes()
    assert note["arguments"] == [*HANDED_ON, "out", "--every", "50", "--steps", "20", "--per-prompt", "4"]


def test_the_tasks_of_an_evaluation_share_its_pictures(cluster, recorder):
    options = [*ONE_TASK_A_NODE, *SMALL_WORKER]
    expect(cluster.wait(cluster.sbatch("slurm/evaluate.sh", *options, env=EVALUATION | {"PYTHON": recorder.path})))
    assert sorted(n["env"]["RANK"] + "/" + n["env"]["WORLD_SIZE"] for n in recorder.notes()) == ["0/2", "1/2"]
    assert [n["arguments"] for n in recorder.notes()] == [[*HANDED_ON, "out"]] * 2


# --- studies


def test_an_array_does_a_study_a_training_each(cluster, recorder):
    env = {"PYTHON": recorder.path, "STUDY": "table3", "SCALE": "small", "OVERRIDES": "--seeds 0 1"}
    job = cluster.sbatch("slurm/ablate.sh", "--array=0,8", *SMALL_WORKER, env=env)
    expect(cluster.wait(job))
    study = ["-m", "pretrain.ablate", "table3", "--scale", "small"]
    expected = [[*study, "--cell", cell, "--processes", "1", "--seeds", "0", "1"] for cell in ("0", "8")]
    assert sorted(n["arguments"] for n in recorder.notes()) == expected


def test_a_study_runs_without_slurm_and_needs_a_name(cluster, recorder):
    done = cluster.command("bash", "slurm/ablate.sh", env={"PYTHON": recorder.path}, check=False)
    assert (done.returncode, recorder.notes()) == (2, [])
    assert done.stderr == "error: STUDY is not set: a study of pretrain.ablate, such as table3\n"
    cluster.command("bash", "slurm/ablate.sh", env={"PYTHON": recorder.path, "STUDY": "neighbours", "OUT": "out"})
    (note,) = recorder.notes()
    assert note["arguments"] == [
        "-m",
        "pretrain.ablate",
        "neighbours",
        "--scale",
        "tiny",
        "--out",
        "out",
        "--processes",
        "1",
    ]


# --- the chain


@pytest.fixture
def schedule(cluster, tmp_path):
    """Run schedule.sh for the small cluster; returns the ids of the jobs it submitted."""

    def run(check: bool = True, **env: str):
        log = f"--output={tmp_path}/%x-%j.out"
        env = {
            "ENCODE_SBATCH": f"--array=0-1 {log} " + " ".join(SMALL_WORKER),
            "TRAIN_SBATCH": f"{log} " + " ".join(ONE_TASK_A_NODE),
            **env,
        }
        done = cluster.command("bash", "slurm/schedule.sh", env=env, check=check)
        run.output = done.stdout + done.stderr
        return re.findall(r"^(\d+)  slurm/", done.stdout, re.MULTILINE)

    return run


def what(note: dict) -> str:
    arguments = note["arguments"]
    return "encode" if arguments[0] == "data_prep/encode.py" else arguments[2]


def test_the_chain_runs_in_order(cluster, recorder, schedule):
    jobs = schedule(
        PYTHON=recorder.path,
        INPUT="/tars",
        OUTPUT="/shards",
        ENCODE_OPTIONS="--token-cap 5",
        STAGE1="demo_256",
        STAGE2="demo_512",
        STAGE2_OVERRIDES="run_dir=runs/b",
        STAGE3="demo_512",
        STAGE3_OVERRIDES="run_dir=runs/c init_from=runs/b",
    )
    assert len(jobs) == 4
    assert f"cancel: scancel {' '.join(jobs)}" in schedule.output
    for job in jobs:
        expect(cluster.wait(job, timeout=180))
    notes = recorder.notes()
    assert [what(n) for n in notes] == ["encode", "encode", "demo_256", "demo_256"] + ["demo_512"] * 4
    assert [n["arguments"][3:] for n in notes[2:]] == [["data.path=/shards"]] * 2 + [
        ["data.path=/shards", "run_dir=runs/b"]
    ] * 2 + [["data.path=/shards", "run_dir=runs/c", "init_from=runs/b"]] * 2
    assert all(n["arguments"][-2:] == ["--token-cap", "5"] for n in notes[:2])


def demo_on(data: Path) -> dict[str, str]:
    """The demo's stages on a data set that is there."""
    words = {f"STAGE{n}_OVERRIDES": f"data.path={data}" for n in (1, 2)}
    return {"STAGE1": "demo_256", "STAGE2": "demo_512", **words}


def test_without_input_the_chain_begins_with_stage_1(cluster, recorder, schedule, data_set):
    jobs = schedule(PYTHON=recorder.path, **demo_on(data_set))
    assert len(jobs) == 2
    for job in jobs:
        expect(cluster.wait(job, timeout=180))
    assert [what(n) for n in recorder.notes()] == ["demo_256"] * 2 + ["demo_512"] * 2


def test_the_chain_waits_for_a_stage_that_comes_back(cluster, program, schedule, data_set, tmp_path):
    python = program("""
        if arguments[2] == "demo_256" and "SLURM_RESTART_COUNT" not in os.environ:
            sys.exit(75)
        (record / f"{time.time_ns()}-{arguments[2]}").touch()
    """)
    first, second = schedule(PYTHON=python, **demo_on(data_set))
    cluster.wait_until_requeued(first)
    waiting = cluster.show(second)[0]  # its Reason may be Resources: Slurm tells the dependency there only by and by
    assert (waiting["JobState"], waiting["Dependency"]) == ("PENDING", f"afterok:{first}(unfulfilled)")
    cluster.start_requeued(first)
    expect(cluster.wait(first))
    expect(cluster.wait(second))
    done = [path.name.split("-")[1] for path in sorted((tmp_path / "record").iterdir())]
    assert done == ["demo_256"] * 2 + ["demo_512"] * 2


def test_the_chain_ends_with_a_failed_job(cluster, program, schedule):
    python = program("""
        (record / str(time.time_ns())).touch()
        sys.exit(5)
    """)
    first, second, third = schedule(PYTHON=python, INPUT="/tars", OUTPUT="/shards")
    assert cluster.wait(first).state == "FAILED"
    assert cluster.wait(second).state == "CANCELLED"
    assert cluster.wait(third).state == "CANCELLED"
    assert len(list((Path(python).parent / "record").iterdir())) == 2  # the two workers, no training


def test_a_chain_that_cannot_be_submitted_whole_leaves_nothing_behind(cluster, recorder, schedule):
    assert schedule(check=False, PYTHON=recorder.path, INPUT="/tars", OUTPUT="/s", TRAIN_SBATCH="--nodes=none") != []
    wait_for(lambda: cluster.command("squeue", "--noheader").stdout == "")


@pytest.mark.parametrize(
    ("env", "error"),
    [
        ({"INPUT": "/tars", "OUTPUT": ""}, "INPUT is set but OUTPUT is not"),
        ({"RUN_DIR": "r"}, "would go to all stages"),
        ({"STAGE3_OVERRIDES": "steps=5"}, "STAGE3_OVERRIDES is set but STAGE3 is not"),
        ({"STAGE1_OVERRIDES": "data.path=/nowhere"}, "error: stage1_256: data: /nowhere is no data set"),
        (
            {"INPUT": "/tars", "OUTPUT": "/shards", "RESOLUTIONS": "256", "STAGE2_OVERRIDES": "init_from=other"},
            (
                "error: stage2_512: data.resolution: 512 is not among RESOLUTIONS (256), in which /shards is encoded\n"
                "error: stage2_512: init_from: other is not the stage before it, whose run_dir is runs/stage1_256\n"
                "error: the stages do not fit: nothing is submitted\n"
            ),
        ),
    ],
)
def test_a_chain_that_cannot_work_is_refused_before_anything_is_submitted(schedule, env, error):
    assert schedule(check=False, **env) == []
    assert error in schedule.output


# --- without a cluster


@pytest.mark.parametrize("script", [*SCRIPTS, ".ci/run"])
def test_bash_can_read_the_scripts(script):
    subprocess.run(["bash", "-n", script], cwd=REPO, check=True)


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "common" not in s and "schedule" not in s])
def test_the_log_goes_to_a_folder_that_is_there(script):
    # Slurm makes no folder for a log: the job would fail without a word.
    (output,) = re.findall(r"^#SBATCH --output=(\S+)$", (REPO / script).read_text(), re.MULTILINE)
    assert (REPO / output).parent.is_dir()


def test_a_stage_outside_slurm_is_refused():
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(["bash", "slurm/stage1_256.sh"], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: this starts one task a GPU with srun: submit it with sbatch\n"


def wait_for(condition, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
