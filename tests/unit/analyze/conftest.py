"""Analyses run as users run them, over small models in place of trained runs, and their tables read back."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.analyze.__main__ import main
from pretrain.models import DiT, preset
from pretrain.pipeline import FocusDiTPipeline, FocusDiTPipelineOutput, FocusDiTTransformer2DModel

PROMPTS = ("a red circle", "a large green square above a small blue triangle", "a star")


@dataclass(frozen=True)
class Done:
    """What an analysis did: exit code, table, folder, and what it said."""

    code: int
    rows: list[dict[str, str]]
    out: Path
    said: str
    errors: list[str]


Analyse = Callable[..., Done]


@pytest.fixture
def analyse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Analyse:
    """Runs an analysis of some models, the runs; in batches of two pictures, with three steps."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def run(name: str, pipelines: Sequence[FocusDiTPipeline], *words: str) -> Done:
        runs = {str(tmp_path / f"run{i}"): pipeline for i, pipeline in enumerate(pipelines)}

        def load_run(path: Path, *asked: Any) -> SimpleNamespace:
            return SimpleNamespace(pipeline=runs[str(path)])

        monkeypatch.setattr("pretrain.sampling.trained_run.load_run", load_run)
        out = tmp_path / "out"
        given = ["--run", *runs, "--prompts", str(tmp_path / "prompts.txt"), "--out", str(out), "--device", "cpu"]
        code = main([name, *given, *([] if name == "skip" else ["--batch-size", "2"]), *words])
        said = capsys.readouterr()
        table = out / f"{name}.csv"
        with table.open() if table.exists() else (tmp_path / "prompts.txt").open() as file:
            rows = list(csv.DictReader(file)) if table.exists() else []
        return Done(code, rows, out, said.out, said.err.splitlines())

    return run


@pytest.fixture
def focus(tiny_pipeline: FocusDiTPipeline) -> FocusDiTPipeline:
    """The tiny FocusDiT, with a copy of its weights that a test may change."""
    dit = DiT(tiny_pipeline.transformer.dit.config)
    dit.load_state_dict(tiny_pipeline.transformer.dit.state_dict())
    return around(tiny_pipeline, dit)


@pytest.fixture
def plain(tiny_pipeline: FocusDiTPipeline) -> FocusDiTPipeline:
    """The tiny DiT, without query masks."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        dit = DiT(preset("dit_tiny"))
        for parameter in dit.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return around(tiny_pipeline, dit)


def around(tiny: FocusDiTPipeline, dit: DiT) -> FocusDiTPipeline:
    parts = tiny.components | {"transformer": FocusDiTTransformer2DModel.of(dit.eval())}
    pipeline = FocusDiTPipeline(**parts, resolution=128, steps=3, guidance=3.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def batches(pipeline: FocusDiTPipeline, **more: Any) -> Iterator[FocusDiTPipelineOutput]:
    """The pictures drawn by the pipeline itself, in the same batches as the analyses', so that rounding is the same."""
    for numbers in ((0, 1), (2,)):
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        yield pipeline([PROMPTS[number] for number in numbers], generator=generators, **more)
