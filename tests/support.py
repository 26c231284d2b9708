"""Helpers of many tests: real training processes and what they left in event files; pictures side by side; pages."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html.parser import HTMLParser
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
# Small steps of the demo's stage, for tests: 4 pictures a step.
SMALL = (
    "deepspeed.train_batch_size=4",
    "deepspeed.train_micro_batch_size_per_gpu=2",
    "preview.every=0",
    "optimizer.warmup_steps=2",
    "logging.every=1",
)


@dataclass(frozen=True)
class Finished:
    """Processes that ended: exit codes by rank, and all they printed."""

    codes: list[int]
    output: str


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launcher(rank: int, processes: int, port: str) -> dict[str, str]:
    """What a launcher tells each process of a node."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": str(max(1, 2 // processes)),
    }


def start_training(config: str, *overrides: str, processes: int = 1) -> list[subprocess.Popen[str]]:
    """The command that users run, as real processes over gloo."""
    port = str(free_port())
    command = [sys.executable, "-m", "pretrain.train", config, *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | launcher(rank, processes, port), text=True, **pipes)  # type: ignore[call-overload]
        for rank in range(processes)
    ]


_FORKSERVER = multiprocessing.get_context("forkserver")
# Else each process imports for many seconds.
_FORKSERVER.set_forkserver_preload(["data_prep.encode", "pretrain.train"])


def fork_training(
    log: Path, config: str, *overrides: str, processes: int = 1, before: Callable[[], None] | None = None, **env: str
) -> list[ForkServerProcess]:
    """The same as `start_training` in a second instead of ten, as the imports are made; all write to `log`.

    `before` is called in each process first: a fault of `faults.py`.
    """
    port = str(free_port())
    started = []
    for rank in range(processes):
        variables = dict(os.environ) | launcher(rank, processes, port) | env
        process = _FORKSERVER.Process(target=_train, args=(str(log), variables, [config, *overrides], before))
        process.start()
        started.append(process)
    return started


def _train(log: str, env: dict[str, str], argv: list[str], before: Callable[[], None] | None) -> None:
    from pretrain.train import main

    os.environ.clear()  # the preloaded process's is that of its start
    os.environ.update(env)
    if before:
        before()
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    os.chdir(ROOT)
    _write_to(log)
    sys.exit(main(argv))


def _write_to(log: str) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def start_encoding(log: Path, *argv: str) -> ForkServerProcess:
    """A process of `data_prep/encode.py`'s own, with one thread, that writes what it says to `log`."""
    process = _FORKSERVER.Process(target=_encode, args=(str(log), argv))
    process.start()
    return process


def _encode(log: str, argv: tuple[str, ...]) -> None:
    from data_prep.encode import main

    torch.set_num_threads(1)  # another number may change the last bits of a product
    _write_to(log)
    sys.exit(main(list(argv)))


def contents(root: Path) -> dict[str, bytes]:
    """All that belongs to a data set, byte for byte."""
    files = (p for p in root.rglob("*") if p.is_file() and p.relative_to(root).parts[0] != "work")
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def scalars(run_dir: Path, tag: str) -> dict[int, float]:
    """A curve of a run's event files, by step; a step that was written twice is an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    points = events.Scalars(tag)
    assert len({p.step for p in points}) == len(points), f"{tag} has doubled points"
    return {p.step: p.value for p in points}


def state_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """All that a run's newest checkpoint keeps of its parameters; its files are verified."""
    from pretrain.checkpoint.reader import newest

    found = newest(run_dir)
    assert found is not None
    found.verify()
    return {f"{k}/{n}": v for k in ("master", "exp_avg", "exp_avg_sq", "ema") for n, v in found.parameters(k).items()}


def same_state(one: Path, other: Path) -> bool:
    """Whether two runs stand at the same step with the same parameters, moments and average, bit for bit."""
    from pretrain.checkpoint.reader import newest

    a, b = state_of(one), state_of(other)
    return newest(one).run_state == newest(other).run_state and all(torch.equal(a[name], b[name]) for name in a)  # type: ignore[union-attr]


def levels(pictures: Iterable[Image.Image]) -> np.ndarray:
    """Pictures of one size as 8-bit levels [B, H, W, 3]."""
    return np.stack([np.asarray(p.convert("RGB")) for p in pictures]).astype(int)


def same_pictures(ones: Iterable[Image.Image], others: Iterable[Image.Image]) -> bool:
    """Whether no channel is more than 2/255 apart, and fewer than 0.1% of them are apart at all."""
    distance = np.abs(levels(ones) - levels(others))
    return bool(distance.max() <= 2 and (distance > 0).mean() < 1e-3)


class Opened(HTMLParser):
    """What a browser finds in a page: its tags, all that it would load, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)
