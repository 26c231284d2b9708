"""Alignment in whole trainings of real processes: accumulation, killed and resumed across `until`, exported without it."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from subprocess import run as run_command

import pytest
import torch
from faults import at_step
from safetensors import safe_open
from support import ROOT, SMALL, end_with_the_first, ended, fork_command, fork_training, same_state, scalars

from pretrain.checkpoint.reader import newest

WORDS = (
    *SMALL,
    "steps=8",
    "checkpoint.every=3",
    "deepspeed.train_micro_batch_size_per_gpu=1",
    "alignment.weight=2",
    "alignment.hidden=32",
    "alignment.until=0.5",
)


@pytest.fixture(scope="module")
def with_features(shape_tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("features") / "shapes"
    command = [sys.executable, "data_prep/encode.py", "--input", f"{shape_tars}/*.tar", "--output", str(root)]
    run_command([*command, "--encoders", "tiny", "--resolutions", "256", "--features", "tiny"], cwd=ROOT, check=True)
    return root


def test_micro_batches_kills_and_an_export(with_features: Path, train, tmp_path: Path) -> None:
    """Steps 1 to 4 are aligned; the checkpoint is of step 3, the kill after step 6.

    Two processes of two micro-batches each have the gradients of one process with the whole batch: what DeepSpeed divides by
    the accumulation holds the alignment, too (DeepSpeed issue 8224).
    """
    words = [*WORDS, f"data.path={with_features}"]
    straight, run, alone = (tmp_path / folder for folder in ("straight", "run", "alone"))
    train("demo_256", *words, f"run_dir={straight}", processes=2)
    train("demo_256", *words, f"run_dir={alone}", "deepspeed.train_micro_batch_size_per_gpu=4")
    for tag in ("train/loss", "alignment/negative_cosine", "train/gradient_norm", "parameter_norm/alignment"):
        assert scalars(alone, tag) == pytest.approx(scalars(straight, tag), rel=1e-4), tag
    aligned = scalars(straight, "alignment/negative_cosine")
    assert list(aligned) == [1, 2, 3, 4] and aligned[4] < aligned[1]

    log, kill = tmp_path / "log", partial(at_step, 5, 0, "SIGKILL")
    processes = fork_training(log, "demo_256", *words, f"run_dir={run}", processes=2, before=kill)
    assert -signal.SIGKILL in end_with_the_first(processes), log.read_text()
    assert "step 3, epoch 0" in train("demo_256", *words, f"run_dir={run}", processes=2).output
    assert same_state(run, straight)
    for tag in ("train/loss", "alignment/negative_cosine"):
        assert scalars(run, tag) == scalars(straight, tag)
    found = newest(run)
    assert found is not None and any(name.startswith("alignment.") for name in found.slots)

    refused = train("demo_256", *words, f"run_dir={alone}", "alignment.weight=0", "steps=9", check=False)
    assert refused.codes == [1] and "alignment: there with alignment, here without" in refused.output
    refused = train("demo_256", *words, f"run_dir={alone}", "alignment.hidden=16", "steps=9", check=False)
    assert refused.codes == [1] and "alignment.hidden: there 32, here 16" in refused.output

    export = fork_command(
        log, ["python", "-m", "pretrain.export", "--run", str(run), "--out", str(tmp_path / "export")]
    )
    assert ended([export]) == [0], log.read_text()
    with safe_open(tmp_path / "export/transformer/diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "alignment" in name]  # noqa: SIM118
    from pretrain.pipeline import FocusDiTPipeline

    pipeline = FocusDiTPipeline.from_pretrained(tmp_path / "export")
    drawn = pipeline(["a small red circle"], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert drawn[0].size == (256, 256)
