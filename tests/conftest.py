"""Fixtures of many tests: a small data set made by the real data prep, and real training processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT, Finished, start_training


@pytest.fixture(scope="session")
def shape_tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars of captioned shapes: 20 pictures, some of them too small for 512 px."""
    from data_prep.shapes import write_tars

    folder = tmp_path_factory.mktemp("tars")
    write_tars(folder, 20, seed=5, per_tar=10, small_share=0.25)
    return folder


@pytest.fixture(scope="session")
def data_set(shape_tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of `shape_tars`, encoded by the command that users run."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    command = [sys.executable, "data_prep/encode.py", "--input", f"{shape_tars}/*.tar", "--output", str(root)]
    subprocess.run([*command, "--encoders", "tiny"], cwd=ROOT, check=True)
    return root


@pytest.fixture
def train() -> Callable[..., Finished]:
    """Runs a training to its end; fails with its output where a process fails, unless `check=False`."""

    def run(config: str, *overrides: str, processes: int = 1, check: bool = True) -> Finished:
        started = start_training(config, *overrides, processes=processes)
        try:
            outputs = [p.communicate(timeout=300)[0] for p in started]
        finally:
            for p in started:
                p.kill()
        finished = Finished([p.returncode for p in started], "\n".join(outputs))
        assert not check or not any(finished.codes), finished.output
        return finished

    return run
