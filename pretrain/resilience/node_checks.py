"""What a training's processes need of their node, tried out: open files, sockets between loader and workers, a compiler."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from multiprocessing.connection import Listener
from typing import Any

from pretrain.config import Config

# Tensors of a micro-batch, each of which is an open file on its way from a worker: `Batch` and its `PackedText`.
TENSORS = 5
OTHER_FILES = 300  # libraries, shards, sockets
ENOUGH_FILES = 1 << 20


def raise_open_files() -> None:
    """Raises the limit of open files of this process, and of those that it will start, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def node_problems(config: Config, deepspeed: dict[str, Any], processes: int, cuda: bool) -> list[str]:
    """A line for each thing that the node does not have; `processes` are those of all nodes."""
    found = compiler_problems(cuda) if config.model.compile else []
    if config.data.workers:
        micros = deepspeed["train_batch_size"] // (processes * deepspeed["train_micro_batch_size_per_gpu"])
        found += [*socket_problems(), *open_files_problems(config, micros)]
    return found


def compiler_problems(cuda: bool) -> list[str]:
    """A problem where torch.compile would find no compiler (C for Triton on GPUs, C++ on CPUs), or not Python's headers."""
    kind, variable, names = ("C", "CC", ("gcc", "clang")) if cuda else ("C++", "CXX", ("g++",))
    mend = f"install one, such as {names[0]}, or load its module, name it by {variable}, or set model.compile=false"
    command = shlex.split(os.environ.get(variable, "")) or [name for name in names if shutil.which(name)][:1]
    if not command or not shutil.which(command[0]):
        what = (
            f"{variable}={command[0]} is not there" if command else f"no {kind} compiler ({', '.join(names)}) on PATH"
        )
        return [f"model.compile: {what}; {mend}"]
    include = sysconfig.get_paths()["include"]
    language = "c" if cuda else "c++"
    command += ["-fsyntax-only", "-x", language, f"-I{include}", "-"]
    done = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True)
    if done.returncode == 0:
        return []
    why = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
    problem = (
        f"model.compile: {command[0]} cannot compile with Python's headers in {include} ({why}); install them (python3-dev), "
        "or set model.compile=false"
    )
    return [problem]


def socket_problems() -> list[str]:
    """A problem where the workers' sockets cannot be made in the folder for temporary files (TMPDIR)."""
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        folder = tempfile.gettempdir()
        problem = (
            f"TMPDIR: the loader's workers cannot make a socket in {folder} ({error}); its path may have 75 characters, and "
            f"has {len(folder)}: set TMPDIR to a short one on the node's own disk, or data.workers=0"
        )
        return [problem]
    return []


def open_files_problems(config: Config, micros: int) -> list[str]:
    """A problem where the tensors on their way from the workers may be more than the files that may be open."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = TENSORS * micros * (config.data.workers * config.data.prefetch + 2) + OTHER_FILES
    if allowed == resource.RLIM_INFINITY or needed <= allowed:
        return []
    problem = (
        f"open files: {allowed} may be open at a time, the loader may need {needed} ({micros} micro-batches a step); raise the "
        "limit (ulimit -n, LimitNOFILE), or take larger micro-batches, fewer data.workers, or a lower data.prefetch"
    )
    return [problem]
