"""Launcher for nodes without a scheduler: python -m pretrain.launch --processes N CONFIG [section.key=value ...]

Starts a training's processes on this node and ends as they do: 0, 75, 1 or 2, as `pretrain.train` (torchrun ends with 1 whatever
the reason). Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP reach every process, which write a checkpoint and end with 75; there is no limit
to the time they take for it. With `--restarts`, a run that lost a process is started again.

On several nodes it is started once on each, with --nodes, --node-rank and --address.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType

from data_prep.common.command import command_parser
from pretrain.distributed.launcher import LAUNCHER_PID, PORT, TORCH
from pretrain.resilience.signals import REQUEUE, heard_signals

# After the first process that failed the others end by themselves; what is left after this many seconds is killed.
GRACE = 30.0


@dataclass
class Launcher:
    """The processes of one node.

    Attributes:
        asked: the signal that asked to stop.
    """

    command: Sequence[str]
    processes: int
    nodes: int = 1
    node_rank: int = 0
    address: str | None = None
    asked: int | None = None
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, restarts: int) -> int:
        """Runs the processes to their end, again after a lost process at most `restarts` times; returns the exit code."""
        handlers = {number: signal.signal(number, self._pass_on) for number in heard_signals()}
        try:
            for left in range(restarts, -1, -1):
                code = self._run_once()
                if self.asked:
                    # Killed by it, as a process is that was still importing: nothing is lost, and a start goes on.
                    return REQUEUE if code > 128 else code
                if left == 0 or not (code == REQUEUE or code > 128):
                    break
                print(
                    f"launch: ended with code {code}; starting again ({left} of {restarts} restarts left)", flush=True
                )
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return code

    def _run_once(self) -> int:
        """Starts the processes and waits for all; returns 0, or the code of the first one that failed."""
        self.running = []
        for variables in self._variables():
            self.running.append(subprocess.Popen(self.command, env=os.environ | variables))
        if self.asked:  # before all were there; the same signal twice counts once
            self._pass_on(self.asked, None)
        first, deadline = 0, float("inf")
        while None in [process.poll() for process in self.running]:
            if not first and (codes := [p.returncode for p in self.running if p.returncode]):
                first, deadline = codes[0], time.monotonic() + GRACE
            if time.monotonic() > deadline:
                for process in self.running:
                    process.kill()
            time.sleep(0.1)
        first = first or next((p.returncode for p in self.running if p.returncode), 0)
        return first if first >= 0 else 128 - first  # of a process that a signal killed, as shells say it

    def _variables(self) -> list[dict[str, str]]:
        """Each process's variables."""
        host, _, port = (self.address or "127.0.0.1").partition(":")
        if not port:
            port = str(free_port()) if self.nodes == 1 else str(PORT)
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.processes)))
        every = {LAUNCHER_PID: str(os.getpid()), "OMP_NUM_THREADS": threads}
        size, first = self.nodes * self.processes, self.node_rank * self.processes
        return [
            every | dict(zip(TORCH, map(str, (first + i, i, size, self.processes, host, port)), strict=True))
            for i in range(self.processes)
        ]

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        for process in self.running:
            process.send_signal(number)


def free_port() -> int:
    """A port that no program listens on."""
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def count_gpus() -> int:
    """The GPUs of this node, or 1 where it has none."""
    import torch  # here, as it takes seconds

    return max(1, torch.cuda.device_count())


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser(
        "Trains a stage in several processes of this node; ends as they do: 75 means to be started again."
    )
    parser.add_argument("--processes", type=int, help="processes on this node (default: one a GPU)")
    parser.add_argument("--restarts", type=int, default=0, help="starts after a lost process, at most")
    parser.add_argument("--nodes", type=int, default=1, help="nodes; start this command on each of them")
    parser.add_argument("--node-rank", type=int, default=0, help="this node's number, from 0")
    parser.add_argument(
        "--address", metavar="HOST[:PORT]", help=f"of node 0, with several nodes (port {PORT} by default)"
    )
    parser.add_argument("training", nargs=argparse.REMAINDER, metavar="CONFIG ...", help="as for pretrain.train")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized: {' '.join(unknown)}; after its own options comes CONFIG, without a module's name")
    processes = count_gpus() if args.processes is None else args.processes
    training = args.training[1:] if args.training[:1] == ["--"] else args.training
    own = {"-h", "--help", *(f"--{name.replace('_', '-')}" for name in vars(args) if name != "training")}
    behind = [word for word in training if word.partition("=")[0] in own]
    wrong = [
        ("pretrain.train is what it starts; give CONFIG alone", training[:1] == ["pretrain.train"]),
        ("CONFIG is missing: a stage's name, or the path of a YAML file", not training),
        (f"{', '.join(behind)}: must stand before CONFIG", bool(behind)),
        ("--processes must be 1 or more", processes < 1),
        ("--restarts must be 0 or more", args.restarts < 0),
        (f"--node-rank must be from 0 to {args.nodes - 1}", not 0 <= args.node_rank < args.nodes),
        ("--address is missing: the host of node 0", args.nodes > 1 and not args.address),
    ]
    if problems := [problem for problem, found in wrong if found]:
        parser.error("; ".join(problems))
    command = [sys.executable, "-u", "-m", "pretrain.train", *training]
    return Launcher(command, processes, args.nodes, args.node_rank, args.address).run(args.restarts)


if __name__ == "__main__":
    sys.exit(main())
