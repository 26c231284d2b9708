"""What a node lacks is a line with its mend: tried with real limits, folders and PATHs."""

from __future__ import annotations

import os
import resource
import tempfile
from multiprocessing import util
from pathlib import Path

import pytest

from pretrain.config import load
from pretrain.resilience.node_checks import (
    compiler_problems,
    node_problems,
    open_files_problems,
    raise_open_files,
    socket_problems,
)


@pytest.mark.parametrize("cuda", [False, True])
def test_no_compiler_on_path(cuda: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert compiler_problems(cuda) == []  # this machine has both, with Python's headers
    monkeypatch.setenv("PATH", str(tmp_path))
    (problem,) = compiler_problems(cuda)
    assert problem.startswith(f"model.compile: no {'C' if cuda else 'C++'} compiler (g")
    monkeypatch.setenv("CC" if cuda else "CXX", "/nowhere/cc -O1")
    (problem,) = compiler_problems(cuda)
    assert "=/nowhere/cc is not there; install one" in problem


def test_a_compiler_without_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    (problem,) = compiler_problems(cuda=False)
    assert "Python.h" in problem and "install them (python3-dev)" in problem


def test_a_long_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A socket's path has 107 characters at most, 32 of them its own name."""
    assert socket_problems() == []
    long = tmp_path / ("x" * (105 - len(str(tmp_path)) - 1))
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setitem(util.process.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
    (problem,) = socket_problems()
    assert problem.startswith(f"TMPDIR: the loader's workers cannot make a socket in {long} (")
    assert "and has 105: set TMPDIR to a short one" in problem


def test_the_limit_of_open_files_is_raised_and_else_told() -> None:
    config, deepspeed = load("demo_256", ["data.path=/set", "data.workers=2"])
    pid = os.fork()
    if pid == 0:  # limits cannot be put back
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 3000))
            raise_open_files()
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (3000, 3000)
            assert open_files_problems(config, 90) == []
            (problem,) = open_files_problems(config, 91)
            assert problem.startswith(
                "open files: 3000 may be open at a time, the loader may need 3030 (91 micro-batches"
            )
            raise_open_files()
        except BaseException as error:
            print(error)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    few = {**deepspeed, "train_batch_size": 256, "train_micro_batch_size_per_gpu": 1}
    assert node_problems(config, few, 2, cuda=False) == []
