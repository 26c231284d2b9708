"""Helpers of many tests: real training processes and what they left in event files; pictures side by side; pages."""

from __future__ import annotations

import multiprocessing.connection
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from importlib import import_module
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
EARLIER = ROOT / "tests" / "earlier"  # tests/integration/test_earlier_version.py says what is there
# Small steps of the demo's stage, for tests: 4 pictures a step, some without their caption, with AdamW.
SMALL = (
    "deepspeed.train_batch_size=4",
    "deepspeed.train_micro_batch_size_per_gpu=2",
    "data.caption_dropout=0.1",
    "preview.every=0",
    "optimizer.name=adamw",
    "optimizer.lr=2.5e-3",
    "optimizer.warmup_steps=2",
    "logging.every=1",
    "logging.peak_tflops=0.1",  # else each process multiplies matrices for an eighth of its time
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
        "OMP_NUM_THREADS": "1",
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
_FORKSERVER.set_forkserver_preload(
    ["data_prep.encode", "pretrain.training", "pretrain.pipeline", "transformers.models.t5.modeling_t5"]
)


def fork(log: Path, target: Callable[..., Any], *args: Any, **env: str) -> ForkServerProcess:
    """A new process that has the imports already: it calls `target`, whose result is its exit code, and writes to `log`.

    `target` must be importable by its name; `env` adds to this process's environment.
    """
    variables = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | env
    process = _FORKSERVER.Process(target=_call, args=(str(log), variables, target, args))
    process.start()
    return process


def _call(log: str, env: dict[str, str], target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.clear()  # the preloaded process's is that of its start
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    os.chdir(ROOT)
    # The default of a program of its own: else each pool or loader that it starts would preload a fork server of its own.
    multiprocessing.set_start_method(None, force=True)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(target(*args))


def fork_training(
    log: Path, config: str, *overrides: str, processes: int = 1, before: Callable[[], None] | None = None, **env: str
) -> list[ForkServerProcess]:
    """The same as `start_training` in a second instead of ten, as the imports are made; all write to `log`.

    `before` is called in each process first: a fault of `faults.py`.
    """
    port, words = str(free_port()), [config, *overrides]
    return [fork(log, _train, before, words, **launcher(rank, processes, port), **env) for rank in range(processes)]


def _train(before: Callable[[], None] | None, argv: list[str]) -> int:
    from pretrain.train import main

    if before:
        before()
    return main(argv)


def fork_command(log: Path, words: Sequence[str], **env: str) -> ForkServerProcess:
    """What `python -m MODULE …` does, in a second instead of ten; `words` are the command line's."""
    return fork(log, _command, words[2], list(words[3:]), **env)


def _command(module: str, argv: list[str]) -> int:
    found = import_module(module)
    if not hasattr(found, "main"):
        found = import_module(f"{module}.__main__")
    return found.main(argv)


def start_encoding(log: Path, *argv: str) -> ForkServerProcess:
    """A process of `data_prep/encode.py`'s own, that writes what it says to `log`."""
    from data_prep.encode import main

    return fork(log, main, list(argv))


def wait_for_line(log: Path, line: str, seconds: float = 200) -> None:
    """Until a process has written the line to its log; the time is for machines that are very busy."""
    deadline = time.monotonic() + seconds
    while not log.exists() or line not in log.read_text():
        assert time.monotonic() < deadline, f"{line!r} was never printed:\n{log.read_text() if log.exists() else ''}"
        time.sleep(0.02)


def ended(started: Iterable[ForkServerProcess], seconds: float = 300) -> list[int | None]:
    """The exit codes, once all have ended by themselves; None where one has not in this time."""
    started, deadline = list(started), time.monotonic() + seconds
    for process in started:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    return codes


def end_with_the_first(started: Sequence[ForkServerProcess], seconds: float = 300) -> list[int | None]:
    """The exit codes at the end of the first of them; the others are killed, as `srun --kill-on-bad-exit` does."""
    multiprocessing.connection.wait([process.sentinel for process in started], timeout=seconds)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    return codes


def draw_in_a_new_process(folder: Path, out: Path, prompts: Sequence[str]) -> list[Image.Image]:
    """Pictures of an exported pipeline, the first from seed 0, drawn by a process of its own with this one's threads."""
    out.mkdir(exist_ok=True)
    process = fork(out / "log", _draw, folder, out, list(prompts), OMP_NUM_THREADS=str(torch.get_num_threads()))
    assert ended([process]) == [0], (out / "log").read_text()
    return [Image.open(out / f"{i}.png").convert("RGB") for i in range(len(prompts))]


def _draw(folder: Path, out: Path, prompts: list[str]) -> None:
    from pretrain.pipeline import FocusDiTPipeline

    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    for i, image in enumerate(FocusDiTPipeline.from_pretrained(folder)(prompts, generator=generators).images):
        image.save(out / f"{i}.png")


def complaint(*overrides: str, name: str = "demo_256") -> list[str]:
    """The lines of a config's error, without the first, which names the file."""
    from pretrain.config import ConfigError, load

    with pytest.raises(ConfigError) as refusal:
        load(name, list(overrides))
    return [line.strip() for line in str(refusal.value).splitlines()[1:]]


def starts(lines: list[str]) -> list[str]:
    """The fields that the lines of an error begin with, sorted."""
    return sorted(line.partition(":")[0] for line in lines)


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


def use_earlier_preset() -> None:
    """Gives the preset of the run in EARLIER the widths that the run was made with."""
    from pretrain.models import PRESETS

    PRESETS["dit_tiny_deep"] = replace(PRESETS["dit_tiny_deep"], width=16, heads=2, depth=5, mask_hidden=(8, 4))


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
