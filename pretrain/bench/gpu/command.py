"""First contact with a machine that has one or several GPUs: what is true there, in few minutes, with made data.

Needs no network, no SLURM and no data. Each part runs in processes of its own, within its time: one that fails, hangs or runs out
of time is recorded as such, and the others go on. Parts come in order of worth; what the minutes do not suffice for is not run.
Writes gpu.json (all numbers), table.txt and log.txt. On a CPU it does small shapes, which shows that the parts run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from pretrain.bench.gpu.session import Settings
from pretrain.bench.gpu.table import table

ROOT = Path(__file__).parents[3]
# Seconds of each part of nine minutes, in order of worth. Together they are more: what one leaves, the next ones have.
SECONDS = {
    "environment": 30,
    "ceilings": 30,
    "network": 30,
    "correctness": 60,
    "graphs": 90,
    "training": 150,
    "zero": 75,
    "profile": 45,
    "checkpoint": 45,
    "sampling": 150,
    "methods": 45,
    "encoders": 60,
    "skipping": 30,
}
TOGETHER = ("network", "zero")  # parts of one process for each GPU
MINUTES = 9.0
LEAST = 5.0  # seconds with which a part is begun
CLOSING = 5.0  # seconds kept for the table and the end of the process


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the command ends within them; default 9")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, table.txt and log.txt")
    parser.add_argument("--parts", nargs="+", choices=SECONDS, default=list(SECONDS), help="default: all")
    parser.add_argument("--preset", default="focusdit_1b_shared2d", help="the backbone; on a CPU a small one")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPUs, where there are any")


def run(args: argparse.Namespace) -> str:
    """The table. Raises ValueError where a part failed, after printing it."""
    if args.minutes <= 0:
        raise ValueError(f"--minutes: {args.minutes} must be above 0")
    end = time.monotonic() + 60 * args.minutes - CLOSING - since_start()
    args.out.mkdir(parents=True, exist_ok=True)
    gpus = 0 if args.device == "cpu" else torch.cuda.device_count()
    if args.device == "cuda" and not gpus:
        raise ValueError("--device cuda: torch finds no GPU here; see nvidia-smi, or leave --device out")
    found: dict[str, Any] = {
        "device": "cuda" if gpus else "cpu",
        "gpus": gpus,
        "small": not gpus,
        "preset": args.preset,
        "minutes": args.minutes,
        "parts": {},
    }
    parts = [name for name in SECONDS if name in args.parts]
    with tempfile.TemporaryDirectory() as folder, (args.out / "log.txt").open("w", encoding="utf-8") as log:
        runner = Runner(found["device"], gpus, args.preset, Path(folder), log)
        try:
            for number, name in enumerate(parts):
                left = end - time.monotonic()
                seconds = min(SECONDS[name] * max(args.minutes / MINUTES, 1.0), left)
                following = parts[number + 1] if number + 1 < len(parts) else None
                found["parts"][name] = runner.run(name, seconds, following)
                (args.out / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
                log.flush()
        finally:
            runner.close()
    text = table(found)
    (args.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    if failed := [name for name, part in found["parts"].items() if part["status"] == "failed"]:
        print(text)
        raise ValueError(f"failed: {', '.join(failed)}; {args.out}/table.txt and {args.out}/log.txt say why")
    return text


def since_start() -> float:
    """Seconds since this process began, at most 60: its imports belong to its minutes."""
    begun = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return min(max(float(Path("/proc/uptime").read_text().split()[0]) - begun, 0.0), 60.0)


@dataclass
class Runner:
    """Runs parts, one after the other; the next one's processes start while one runs, as imports take seconds."""

    device: str
    gpus: int
    preset: str
    folder: Path
    log: IO[str]

    def __post_init__(self) -> None:
        self._ready: dict[str, list[subprocess.Popen[str]]] = {}

    def run(self, name: str, seconds: float, following: str | None) -> dict[str, Any]:
        """Runs a part within its seconds; returns how it ended, and its figures."""
        if seconds < LEAST:
            return {"status": "not run", "reason": "no time was left", "seconds": 0.0, "figures": []}
        self.log.write(f"\n==== {name}\n")
        self.log.flush()
        start = time.monotonic()
        processes = self._ready.pop(name, None) or self._start(name)
        if following:
            self._ready[following] = self._start(following)
        records = [self.folder / f"{name}.{rank}.jsonl" for rank in range(len(processes))]
        for rank, (process, record) in enumerate(zip(processes, records, strict=True)):
            device = f"cuda:{rank}" if self.device == "cuda" else "cpu"
            small, scratch = self.device == "cpu", str(self.folder)
            settings = Settings(device, self.preset, small, seconds - 1.0, str(record), scratch)
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended already: its exit code tells
                process.stdin.write(json.dumps(asdict(settings)) + "\n")
                process.stdin.close()
        status, reason = wait_for(processes, start + seconds)
        figures = [json.loads(line) for line in records[0].read_text().splitlines()] if records[0].exists() else []
        wrong = [f["name"] for f in figures if f["status"] in ("wrong", "failed")]
        if status == "done" and wrong:
            status, reason = "failed", "; ".join(wrong)
        if status == "done" and figures and all(f["status"] == "not run" for f in figures):
            status, reason = "not run", figures[0]["reason"]
        return {"status": status, "reason": reason, "seconds": time.monotonic() - start, "figures": figures}

    def _start(self, name: str) -> list[subprocess.Popen[str]]:
        count = max(self.gpus, 1) if name in TOGETHER else 1
        port = str(_free_port())
        command = [sys.executable, "-m", "pretrain.bench.gpu.worker", name]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        return [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # it is ended with all that it has started
                env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # as training does
                | os.environ
                | world
                | {"PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port},
            )
            for rank in range(count)
        ]

    def close(self) -> None:
        """Ends the processes that were started and are not needed."""
        for processes in self._ready.values():
            _end(processes)


def wait_for(processes: Sequence[subprocess.Popen[str]], end: float) -> tuple[str, str]:
    """Until all have ended, one has failed, or the time is over; the others are ended then. Returns status and reason."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed or None not in codes or time.monotonic() >= end:
            break
        time.sleep(0.05)
    _end(processes)
    if failed:
        return "failed", f"exit code {failed[0]}: see log.txt"
    return ("out of time", "") if None in codes else ("done", "")


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
