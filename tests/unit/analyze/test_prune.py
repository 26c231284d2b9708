"""Removing FFNs: order, masks, parameters and deviation of the table from models that lose their FFNs in a plain way."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from PIL import Image
from torch import nn

from pretrain.pipeline import FocusDiTPipeline

from .conftest import Analyse, around, batches

pytestmark = pytest.mark.usefixtures("one_thread")


class Nothing(nn.Module):
    """An FFN that adds nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


@pytest.fixture
def deep(focus: FocusDiTPipeline) -> FocusDiTPipeline:
    """Four blocks, each with all of its vocabulary to itself, and with masks of its own level."""
    from dataclasses import replace

    from pretrain.models import DiT

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        dit = DiT(replace(focus.transformer.dit.config, depth=4, ffn="uniform"))
        for parameter in dit.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for block, level in enumerate((1.0, -1.0, 0.0, -2.0)):
            dit.block(block).query_mask.last.linear.bias.fill_(level)  # type: ignore[union-attr]
    return around(focus, dit)


def test_every_figure_of_the_table(analyse: Analyse, deep) -> None:
    done = analyse("prune", [deep], "--remove", "1", "3", "4", "--compared", "2")
    assert done.code == 0
    masks = [p for output in batches(deep, output_query_masks=True) for p in output.query_masks.tolist()]
    by_step = [
        [sum(sum(p[s][k]) for p in masks) / (len(masks) * len(masks[0][s][k])) for s in range(3)] for k in range(4)
    ]
    order = sorted(range(4), key=lambda k: sum(by_step[k]))
    assert [row["block"] for row in done.rows] == ["", *map(str, order)]
    reference = next(iter(batches(deep, output_type="latent"))).images
    dit = deep.transformer.dit
    whole = sum(p.numel() for p in dit.parameters())
    assert [row["removed"] for row in done.rows] == ["0", "1", "2", "3", "4"]
    smaller = copy.deepcopy(dit)
    for row in done.rows:
        if row["block"]:
            k = int(row["block"])
            values = [float(row[key]) for key in ("mask_mean", "mask_min", "mask_max")]
            assert values == pytest.approx([sum(by_step[k]) / 3, min(by_step[k]), max(by_step[k])], rel=1e-6)
            smaller.blocks[k].ffn = Nothing()
        left = sum(p.numel() for p in smaller.parameters())
        assert int(row["parameters"]) == left and float(row["share_left"]) == pytest.approx(left / whole)
        if row["removed"] == "2":
            assert row["latent_deviation"] == ""
            continue
        latents = next(iter(batches(around(deep, smaller), output_type="latent"))).images
        apart = [
            math.dist(a.flatten().tolist(), b.flatten().tolist()) / b.norm().item()
            for a, b in zip(latents, reference, strict=True)
        ]
        assert float(row["latent_deviation"]) == pytest.approx(sum(apart) / 2, rel=1e-3, abs=1e-6)
    assert deep.transformer.dit.config.removed_ffns == (), "the run's own model is back in its place"
    assert Image.open(done.out / "prune.png").width > 1000


def test_masks_that_are_nan_have_no_order(analyse: Analyse, deep) -> None:
    with torch.no_grad():
        deep.transformer.dit.block(3).query_mask.last.linear.bias.fill_(math.nan)
    done = analyse("prune", [deep], "--steps", "1")
    (line,) = done.errors
    assert done.code == 1 and "the query masks of blocks 3 are NaN, so no order of the blocks is known" in line
    assert "python -m pretrain.analyze masks shows them" in line


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        (["--remove", "5"], "--remove 5: the model has 4 FFNs; give a number from 1 to 4"),
        (["--compared", "0"], "--compared 0: must be at least 1"),
    ],
)
def test_bad_options_are_one_line(analyse: Analyse, deep, words, mend) -> None:
    done = analyse("prune", [deep], *words)
    assert done.code == 1 and done.errors == [f"analyze: {mend}"]
