"""Fixtures of many tests: a small data set made by the real data prep, real training processes, and a small pipeline."""

from __future__ import annotations

import os
import tempfile

# One thread in every process of the tests, so that results do not depend on the machine's cores, and none waits for another.
os.environ["OMP_NUM_THREADS"] = "1"
# On a machine with AVX-512 torch chooses its bf16 attention by what oneDNN knows: who imitates one without must limit both.
if os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
    # torch 2.11's cache of compiled graphs does not know of the limit: code made for AVX-512 would be taken, and crashes.
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.environ['ATEN_CPU_CAPABILITY']}"
    )

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support import ROOT, Finished, fork_training, use_earlier_preset

if TYPE_CHECKING:
    from pretrain.pipeline import FocusDiTPipeline


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


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """Runs a training to its end; fails with its output where a process fails, unless `check=False`."""

    def run(config: str, *overrides: str, processes: int = 1, check: bool = True, **more: Any) -> Finished:
        log = tmp_path_factory.mktemp("train") / "log"
        started = fork_training(log, config, *overrides, processes=processes, **more)
        try:
            deadline = time.monotonic() + 300
            for p in started:
                p.join(max(0, deadline - time.monotonic()))
        finally:
            for p in started:
                p.kill()
                p.join()
        finished = Finished([p.exitcode for p in started], log.read_text())  # type: ignore[misc]
        assert not check or not any(finished.codes), finished.output
        return finished

    return run


@pytest.fixture(scope="session")
def tiny_pipeline() -> FocusDiTPipeline:
    """The tiny FocusDiT with random weights, as after some training: its pictures depend on all that it is given."""
    import torch

    from data_prep.encoders import TextEncoder, Vae
    from pretrain.models import DiT, preset
    from pretrain.pipeline import FocusDiTPipeline, FocusDiTTransformer2DModel
    from pretrain.schedulers import build_scheduler

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        dit = DiT(preset("focusdit_tiny")).eval()
        for parameter in dit.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    text, vae, transformer = TextEncoder("tiny"), Vae("tiny"), FocusDiTTransformer2DModel.of(dit)
    parts = (text.tokenizer, text.model, vae.model, transformer, build_scheduler("flow", 3.0))
    pipeline = FocusDiTPipeline(*parts, resolution=64, steps=3, guidance=3.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tiny_pipeline: FocusDiTPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_pipeline`, saved."""
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def earlier_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset of the run in `EARLIER`, as the run was made with it."""
    from pretrain.models import PRESETS

    monkeypatch.setitem(PRESETS, "dit_tiny_deep", PRESETS["dit_tiny_deep"])  # put back after the test
    use_earlier_preset()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products of small models wait for their threads longer than they compute: a third of the time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hangups() -> Iterator[None]:
    """SIGHUP as it is without nohup, which has it ignored in all that it starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
