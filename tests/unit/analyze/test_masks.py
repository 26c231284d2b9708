"""Query masks over blocks and timesteps: every figure of the table from the pipeline's own masks, in plain loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from PIL import Image

from .conftest import Analyse, batches

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_figure_of_the_table(analyse: Analyse, focus) -> None:
    done = analyse("masks", [focus])
    assert done.code == 0
    masks = [picture for output in batches(focus, output_query_masks=True) for picture in output.query_masks.tolist()]
    timesteps = focus.scheduler.timesteps.tolist()
    depth = focus.transformer.dit.config.depth
    assert len(done.rows) == 3 * depth
    for row, (block, step) in zip(done.rows, [(k, s) for k in range(depth) for s in range(3)], strict=True):
        values = [mask for picture in masks for mask in picture[step][block]]
        assert (int(row["block"]), float(row["timestep"]), int(row["tokens"])) == (block, timesteps[step], 3 * 16)
        assert float(row["mean"]) == pytest.approx(sum(values) / len(values), rel=1e-9)
        assert float(row["std"]) == pytest.approx(statistics.pstdev(values), rel=1e-4, abs=1e-7)
        assert float(row["share_under_0.15"]) == pytest.approx(sum(v < 0.15 for v in values) / len(values), abs=1e-12)
    assert Image.open(done.out / "masks.png").width > 1000
    assert Image.open(done.out / "masks_map.png").height > 100


def test_nans_are_shown(analyse: Analyse, focus) -> None:
    last = focus.transformer.dit.config.depth - 1
    with torch.no_grad():
        focus.transformer.dit.block(last).query_mask.last.linear.bias.fill_(math.nan)
    done = analyse("masks", [focus])
    first_step = {int(row["block"]): row for row in done.rows if row["timestep"] == done.rows[0]["timestep"]}
    damaged, sound = first_step[last], first_step[0]
    assert all(math.isnan(float(damaged[key])) for key in ("mean", "std", "share_under_0.15"))
    assert not math.isnan(float(sound["mean"]))


@pytest.mark.parametrize("name", ["masks", "natural_mask", "skip", "prune"])
def test_a_run_without_query_masks_is_one_line(analyse: Analyse, plain, name) -> None:
    done = analyse(name, [plain])
    (line,) = done.errors
    assert done.code == 1 and line.startswith("analyze: ")
    assert line.endswith("was trained without query masks (model.mask=none): give a run of a FocusDiT")
    assert not done.out.exists()
