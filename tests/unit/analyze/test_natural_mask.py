"""Natural and learned masks: every figure of the table in plain loops, smoothness and edges of maps whose values are known."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.analyze.natural_mask import correlation, edges, smoothness
from pretrain.pipeline import FocusDiTPipeline

from .conftest import Analyse, batches

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE, PIXELS = 4, 32  # tokens of a side, pixels of a token's


def shares(pipeline: FocusDiTPipeline) -> tuple[dict, list[Image.Image]]:
    """Each mask of each picture, by kind, block and step, as lists of tokens; and the pictures."""
    dit = pipeline.transformer.dit
    keys: dict[int, list[list[torch.Tensor]]] = defaultdict(list)

    def start(block: int) -> None:
        keys[block].append([])

    hooks = []
    for k in range(len(dit.blocks)):
        hooks.append(dit.block(k).register_forward_pre_hook(lambda m, i, k=k: start(k)))
        hooks.append(dit.block(k).ffn.key.register_forward_hook(lambda m, i, o, k=k: keys[k][-1].append(o)))
        hooks.append(
            dit.block(k).register_forward_hook(lambda m, i, o, k=k: keys[k][-1].extend(shared) or shared.clear())
        )
    shared: list[torch.Tensor] = []
    hooks.append(dit.shared_expert.key.register_forward_hook(lambda m, i, o: shared.append(o)))
    found, pictures = defaultdict(list), []
    for output in batches(pipeline, output_query_masks=True):
        pictures += output.images
        for picture in range(len(output.images)):
            for k in range(len(dit.blocks)):
                for step in range(3):
                    own, common = keys[k][step]
                    active = [
                        (torch.cat([o, c]) > 0).tolist() for o, c in zip(own[picture], common[picture], strict=True)
                    ]
                    found["natural", k, step].append([sum(token) / len(token) for token in active])
                    found["learned", k, step].append(output.query_masks[picture, step, k].tolist())
        keys.clear()
    for hook in hooks:
        hook.remove()
    return found, pictures


def moran(tokens: list[float]) -> float:
    """Moran's I with a weight of 1 for each token above, below, left and right of one."""
    mean = sum(tokens) / len(tokens)
    weights, product = 0, 0.0
    for i in range(SIDE * SIDE):
        for j in range(SIDE * SIDE):
            if abs(i // SIDE - j // SIDE) + abs(i % SIDE - j % SIDE) == 1:
                weights += 1
                product += (tokens[i] - mean) * (tokens[j] - mean)
    return len(tokens) / weights * product / sum((v - mean) ** 2 for v in tokens)


def slow_edges(picture: Image.Image) -> list[float]:
    """Central differences of the brightness, one-sided at the borders, in the mean over each token's 32 × 32 pixels."""
    brightness, size = picture.convert("L"), SIDE * PIXELS
    level = [[brightness.getpixel((x, y)) / 255 for x in range(size)] for y in range(size)]

    def slope(values: list[float], i: int) -> float:
        low, high = max(i - 1, 0), min(i + 1, size - 1)
        return (values[high] - values[low]) / (high - low)

    columns = [[level[y][x] for y in range(size)] for x in range(size)]
    strength = [[math.hypot(slope(columns[x], y), slope(level[y], x)) for x in range(size)] for y in range(size)]
    inside = range(PIXELS)
    return [
        sum(strength[PIXELS * r + dy][PIXELS * c + dx] for dy in inside for dx in inside) / PIXELS**2
        for r in range(SIDE)
        for c in range(SIDE)
    ]


def test_every_figure_of_the_table(analyse: Analyse, focus) -> None:
    done = analyse("natural_mask", [focus])
    assert done.code == 0
    found, pictures = shares(focus)
    edge = [slow_edges(picture) for picture in pictures]
    timesteps, depth = focus.scheduler.timesteps.tolist(), focus.transformer.dit.config.depth
    assert len(done.rows) == 2 * 3 * depth
    keys = [(kind, k, s) for kind in ("natural", "learned") for k in range(depth) for s in range(3)]
    for row, (kind, block, step) in zip(done.rows, keys, strict=True):
        maps = found[kind, block, step]
        assert [row["mask"], row["block"], row["pictures"], row["undefined"]] == [kind, str(block), "3", "0"]
        assert float(row["timestep"]) == timesteps[step]
        assert float(row["mean"]) == pytest.approx(sum(map(sum, maps)) / (3 * 16), rel=1e-6)
        assert float(row["smoothness"]) == pytest.approx(sum(map(moran, maps)) / 3, rel=1e-4, abs=1e-6)
        along = [statistics.correlation(tokens, e) for tokens, e in zip(maps, edge, strict=True)]
        assert float(row["edge_correlation"]) == pytest.approx(sum(along) / 3, rel=1e-4, abs=1e-6)
    assert Image.open(done.out / "natural_mask.png").width > 500


def test_a_constant_mask_has_no_smoothness_and_that_is_said(analyse: Analyse, focus) -> None:
    query_mask = focus.transformer.dit.block(0).query_mask
    with torch.no_grad():
        query_mask.last.linear.weight.zero_()
        query_mask.last.premask.zero_()
    done = analyse("natural_mask", [focus])
    constant = [row for row in done.rows if (row["mask"], row["block"]) == ("learned", "0")]
    assert len(constant) == 3 and all(row["undefined"] == "3" for row in constant)
    assert all(math.isnan(float(row[key])) for row in constant for key in ("smoothness", "edge_correlation"))
    assert all(row["undefined"] == "0" for row in done.rows if row["mask"] == "natural")


def test_maps_whose_smoothness_is_known() -> None:
    column = torch.arange(8.0).repeat(8, 1)
    chequered = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    noise = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    maps = torch.stack([column.flatten(), chequered.double().flatten(), torch.full((64,), 0.1)]).double()
    smooth, chess, constant = smoothness(maps, (8, 8)).tolist()
    assert smooth > 0.8 and chess == pytest.approx(-1) and math.isnan(constant)
    assert smoothness(noise.double(), (8, 8)).mean().item() == pytest.approx(-1 / 63, abs=0.005), "its expectation"
    torch.testing.assert_close(smoothness(5 + 3 * maps[:2], (8, 8)), smoothness(maps[:2], (8, 8)))


def test_edges_lie_where_brightness_changes() -> None:
    level = np.zeros((32, 48), np.uint8)
    level[:, 24:] = 255
    found = edges(Image.fromarray(level), (2, 3)).unflatten(0, (2, 3))
    assert found[:, [0, 2]].abs().max() == 0
    torch.testing.assert_close(found[:, 1], torch.full((2,), 1 / 16, dtype=torch.float64))
    assert correlation(found.flatten(), 1 - 2 * found.flatten()).item() == pytest.approx(-1)
