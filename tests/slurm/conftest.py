"""A real two-node Slurm cluster on this machine, for the tests of slurm/*.sh.

    munged, slurmctld            one each, with keys, sockets, ports and state of their own in pytest's temporary folder
    slurmd -N n1, slurmd -N n2   two nodes of 2 CPUs and 2 pretended GPUs, each in mount and PID namespaces of its own

Two nodes on one machine would meet in /dev/shm, where mosaicml-streaming keeps names that must be unique to a node:
each node mounts its own there, and its jobs get their own TMPDIR. A node's whole PID namespace dies with one kill, and
the kernel kills all of the cluster when pytest dies, by whatever end.

Where the cluster cannot be (not root, no Slurm) its tests are skipped; with REQUIRE_SLURM=1 they are errors.
"""

import json
import os
import random
import re
import shutil
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "unshare", "setpriv")
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED", "SIGNALING")

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n/slurmd.log
# Job ids that differ between clusters that run at one time: MASTER_PORT comes from them, and the host is the same.
FirstJobId={first_job_id}
MinJobAge=86400
ProctrackType=proctrack/pgid
TaskPlugin=task/none
TaskProlog={root}/task_prolog.sh
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=5
{gres_types}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1_port} CPUs=2 RealMemory=100000 {gres}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2_port} CPUs=2 RealMemory=100000 {gres}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class JobResult:
    state: str  # COMPLETED, FAILED, CANCELLED, NODE_FAIL, ...
    exit_code: int  # the batch script's, or 128 + the signal that ended it
    log: str  # what the job printed, "" when it never started


@dataclass
class Cluster:
    root: Path
    gpus: int  # pretended ones, a node; 0: a cluster that has never heard of GPUs
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        """The environment of a user's shell: nothing of a cluster that the tests themselves may run in."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "OMP"))}
        return env | {"SLURM_CONF": str(self.root / "slurm.conf")}

    def command(self, *words: object, env: dict[str, str] | None = None, check: bool = True):
        """Run a Slurm command (or a script that calls some) in the repository's root, as a user would."""
        done = subprocess.run(
            [str(w) for w in words], cwd=REPO, env=self.env | (env or {}), capture_output=True, text=True, timeout=120
        )
        if check and done.returncode:
            raise RuntimeError(f"{words} exited with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def sbatch(self, script: str | Path, *options: str, env: dict[str, str] | None = None) -> str:
        """Submit; the log goes to the cluster's folder unless an option says otherwise. Returns the job's id."""
        log = f"--output={self.root}/logs/%x-%j.out"
        return self.command("sbatch", "--parsable", log, *options, script, env=env).stdout.strip()

    def show(self, job_id: str) -> list[dict[str, str]]:
        """The fields of `scontrol show job`: of one job, or of each task of an array."""
        lines = self.command("scontrol", "show", "--oneliner", "job", job_id).stdout.splitlines()
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]

    def wait(self, job_id: str, timeout: float = 120) -> JobResult:
        """Wait for the job's end (an array's: for all its tasks, and one that failed is the result).

        One that has not ended by then is cancelled, and a TimeoutError tells its log.
        """
        deadline, hurried = time.monotonic() + timeout, set()
        while unfinished := [job for job in self.show(job_id) if job["JobState"] in UNFINISHED]:
            # A start that was asked to end by what the one before it was meant for is back in the queue, for two minutes.
            for job in unfinished:
                start = (job["JobId"], job["Restarts"])
                if job["Reason"] == "BeginTime" and job["Restarts"] != "0" and start not in hurried:
                    hurried.add(start)
                    self._start_soon(job["JobId"])
            if time.monotonic() > deadline:
                self.command("scancel", job_id)
                job = unfinished[0]
                raise TimeoutError(f"job {job_id} is {job['JobState']} ({job['Reason']}): {self._log(job)}")
            time.sleep(0.3)
        tasks = self.show(job_id)
        job = next((t for t in tasks if t["JobState"] != "COMPLETED"), tasks[0])
        code, signal = (int(n) for n in job["ExitCode"].split(":"))
        return JobResult(job["JobState"], code or (signal and 128 + signal), self._log(job))

    def start_requeued(self, job_id: str, restarts: int = 1, timeout: float = 60) -> None:
        """Start a job, once it is back in the queue, at once."""
        self.wait_until_requeued(job_id, restarts, timeout)
        self._start_soon(job_id)

    def wait_until_requeued(self, job_id: str, restarts: int = 1, timeout: float = 60) -> None:
        """Wait for a job to be back in the queue, where it then stays for two minutes."""
        deadline = time.monotonic() + timeout
        while (job := self.show(job_id)[0])["JobState"] != "PENDING" or int(job["Restarts"]) < restarts:
            if time.monotonic() > deadline or job["JobState"] not in UNFINISHED:
                raise TimeoutError(f"job {job_id} is {job['JobState']}, not requeued: {self._log(job)}")
            time.sleep(0.2)

    def _start_soon(self, job_id: str) -> None:
        """Not in the second in which it was killed: slurmd refuses that. It may have started meanwhile."""
        self.command("scontrol", "update", f"JobId={job_id}", "StartTime=now+2", check=False)

    @staticmethod
    def _log(job: dict[str, str]) -> str:
        path = Path(job["StdOut"])
        return path.read_text() if path.exists() else ""

    def start_node(self, name: str) -> None:
        mount = 'mount -t tmpfs -o size=2g tmpfs /dev/shm && { "$@" & wait; }'  # bash stays, as PID 1: it reaps orphans
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._start(name, *namespaces, "bash", "-c", mount, "bash", "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """As if its plug were pulled: slurmd and every process of its jobs are gone at once."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def start(self) -> None:
        self._write_files()
        munge = [f"--{f}-file={self.root}/munge.{f}" for f in ("key", "log", "pid", "seed")]
        # --force: pytest's folder is closed to others, of which munged would complain.
        self._start("munged", "munged", "--foreground", "--force", f"--socket={self.root}/munge.socket", *munge)
        self._until((self.root / "munge.socket").exists, "munged's socket")
        self._start("slurmctld", "slurmctld", "-D")
        for name in NODES:
            self.start_node(name)
        self._until(self.idle, "two idle nodes")

    def idle(self) -> bool:
        states = self.command("sinfo", "--noheader", "--Node", "--format=%T", check=False).stdout.split()
        return states == ["idle"] * len(NODES)

    def stop(self) -> None:
        for name in reversed(list(self.daemons)):  # munged last: it was first
            self.kill_node(name)

    def _write_files(self) -> None:
        for folder in ("state", "logs", *(f"{n}/{f}" for n in NODES for f in ("spool", "tmp"))):
            (self.root / folder).mkdir(parents=True)
        (self.root / "munge.key").write_bytes(os.urandom(128))
        (self.root / "munge.key").chmod(0o600)
        prolog = self.root / "task_prolog.sh"
        prolog.write_text(f'#!/bin/sh\necho "export TMPDIR={self.root}/$SLURMD_NODENAME/tmp"\n')
        prolog.chmod(0o755)
        (self.root / "cgroup.conf").write_text("")
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-{self.gpus - 1}]\n" if self.gpus else "")
        for index in range(self.gpus):
            # A twin of /dev/null: slurmd wants a device, nobody opens it.
            os.mknod(self.root / f"gpu{index}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            ports = [s.bind(("127.0.0.1", 0)) or s.getsockname()[1] for s in (a, b, c)]
        text = SLURM_CONF.format(
            root=self.root,
            host=socket.gethostname().split(".")[0],
            first_job_id=random.randrange(1000, 9000),
            **dict(zip(("controller_port", "n1_port", "n2_port"), ports, strict=True)),
            gres_types="GresTypes=gpu" if self.gpus else "",
            gres=f"Gres=gpu:{self.gpus}" if self.gpus else "",
        )
        (self.root / "slurm.conf").write_text(text)

    def _start(self, name: str, *words: str) -> None:
        with open(self.root / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.env,
            )

    def _until(self, condition, what: str, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            dead = [f"{n} exited with {d.returncode}" for n, d in self.daemons.items() if d.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = [*self.root.glob("*.out"), *self.root.glob("*.log"), *self.root.glob("*/slurmd.log")]
                tails = "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in logs)
                raise RuntimeError(f"no {what} ({'; '.join(dead) or f'after {timeout:.0f} s'})\n{tails}")
            time.sleep(0.2)


def missing() -> str:
    """What keeps this machine from running the cluster, "" for nothing."""
    if os.geteuid() != 0:
        return "not root: unshare, munged and two slurmd need it"
    if absent := [p for p in PROGRAMS if not shutil.which(p)]:
        return f"not installed: {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)"
    trial = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    done = subprocess.run(trial, capture_output=True, text=True)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else ""


def running_cluster(root: Path, gpus: int) -> Iterator[Cluster]:
    if reason := missing():
        if os.environ.get("REQUIRE_SLURM") == "1":
            raise RuntimeError(f"REQUIRE_SLURM=1, but {reason}")
        pytest.skip(reason)
    cluster = Cluster(root, gpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Two nodes of 2 CPUs and 2 pretended GPUs each."""
    yield from running_cluster(tmp_path_factory.mktemp("cluster"), gpus=2)


@pytest.fixture(scope="session")
def cpu_cluster(tmp_path_factory) -> Iterator[Cluster]:
    """The same on a site whose Slurm knows no GPUs at all."""
    yield from running_cluster(tmp_path_factory.mktemp("cpu_cluster"), gpus=0)


@pytest.fixture
def program(tmp_path):
    """Make an interpreter for PYTHON from a Python body; it sees `arguments` and `record`, a folder for its notes.

    What schedule.sh asks before it submits anything, the real one answers.
    """
    (tmp_path / "record").mkdir()

    def make(body: str) -> str:
        path = tmp_path / "program"
        head = "import json, os, sys, time\nfrom pathlib import Path\n"
        head += f"arguments, record = sys.argv[1:], Path({str(tmp_path / 'record')!r})\n"
        head += 'if "pretrain.chain" in arguments: os.execv(sys.executable, [sys.executable, *arguments])\n'
        path.write_text(f"#!{sys.executable}\n{head}{textwrap.dedent(body)}")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def recorder(program, tmp_path):
    """Writes arguments, environment and time; `notes()` reads what all its runs wrote, the earliest first."""
    body = """
        note = {"arguments": arguments, "env": dict(os.environ), "time": time.time()}
        (record / f"{time.time_ns()}-{os.getpid()}.json").write_text(json.dumps(note))
    """

    class Recorder:
        path = program(body)

        @staticmethod
        def notes() -> list[dict]:
            return [json.loads(p.read_text()) for p in sorted((tmp_path / "record").iterdir())]

    return Recorder()
