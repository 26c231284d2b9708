"""Skipping with a trained run: FLOPs and deviation of the table from the pipeline's own skipping."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from pretrain.models.cost import ffn_flops
from pretrain.pipeline import FocusDiTPipeline

from .conftest import PROMPTS, Analyse

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(pipeline: FocusDiTPipeline, **skipping):
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    return pipeline(list(PROMPTS), generator=generators, output_type="latent", **skipping)


def test_every_figure_of_the_table(analyse: Analyse, focus) -> None:
    plain = draw(focus, output_query_masks=True)
    middle = plain.query_masks.median().item()
    done = analyse("skip", [focus], "--thresholds", "1", "0", f"{middle}", "--rounds", "1")
    assert done.code == 0
    flops = ffn_flops(focus.transformer.dit.config)
    expected = [(unit, t) for unit in ("token", "layer") for t in (0, middle, 1)]
    assert [(row["unit"], float(row["threshold"])) for row in done.rows] == expected
    for row in done.rows:
        drawn = draw(focus, skip_threshold=float(row["threshold"]), skip_unit=row["unit"])
        kept = sum(n * f for step in drawn.ffn_work.kept_SK.tolist() for n, f in zip(step, flops, strict=True))
        whole = sum(n * f for step in drawn.ffn_work.tokens_SK.tolist() for n, f in zip(step, flops, strict=True))
        assert float(row["ffn_flops_saved"]) == pytest.approx(1 - kept / whole, abs=1e-9)
        apart = (drawn.images - plain.images).flatten().tolist()
        size = sum(v * v for v in plain.images.flatten().tolist()) ** 0.5
        assert float(row["latent_deviation"]) == pytest.approx(sum(v * v for v in apart) ** 0.5 / size, abs=1e-4)
        assert float(row["seconds"]) > 0
    saved = [float(row["ffn_flops_saved"]) for row in done.rows]
    assert saved[0] == saved[3] == 0 and saved[2] == saved[5] == 1 and 0.2 < saved[1] < 0.8
    assert Image.open(done.out / "skip.png").width > 1000


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        (["--thresholds", "0", "1.5"], "--thresholds 1.5: must be in 0..1, as the query masks are"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
    ],
)
def test_bad_options_are_one_line(analyse: Analyse, focus, words, mend) -> None:
    done = analyse("skip", [focus], *words)
    assert done.code == 1 and done.errors == [f"analyze: {mend}"]
