"""Use of the FFN vocabulary: every figure of the table from counts in plain loops, and NaNs that stay in sight.

Letters: B pictures, N tokens, C entries.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pretrain.analyze.activations import Tally
from pretrain.pipeline import FocusDiTPipeline

from .conftest import Analyse, batches

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens_of(pipeline: FocusDiTPipeline) -> list[list[list[bool]]]:
    """By block, every token's entries, and whether it activates them: by the FFNs' inputs, and the paper's own lines (§3)."""
    dit = pipeline.transformer.dit
    found: list[list[list[bool]]] = [[] for _ in dit.blocks]
    current: list[int] = []

    def activations(z_BND: Tensor, expert: Any) -> Tensor:
        return F.gelu(expert.key(z_BND), approximate="tanh")

    def watch(ffn: nn.Module, inputs: tuple[Tensor], block: int) -> None:
        current.append(block)
        experts = [ffn, *([dit.shared_expert] if dit.shared_expert is not None else [])]
        x_BNC = torch.cat([activations(inputs[0], expert) for expert in experts], dim=-1)
        with_text = x_BNC[: len(x_BNC) // 2]
        found[block] += (with_text > 0).flatten(0, 1).tolist()

    hooks = [
        dit.block(k).ffn.register_forward_pre_hook(lambda ffn, inputs, k=k: watch(ffn, inputs, k))
        for k in range(len(dit.blocks))
    ]
    for _ in batches(pipeline, output_type="latent"):
        pass
    for hook in hooks:
        hook.remove()
    assert len(current) == len(dit.blocks) * 3 * 2, "each block in three steps of two batches"
    return found


def test_every_figure_of_the_table(analyse: Analyse, plain, focus) -> None:
    done = analyse("utilization", [plain, focus], "--label", "DiT", "FocusDiT")
    assert done.code == 0
    rows = iter(done.rows)
    for name, pipeline in (("DiT", plain), ("FocusDiT", focus)):
        width, means = pipeline.transformer.dit.config.width, []
        for block, tokens in enumerate(tokens_of(pipeline)):
            assert len(tokens) == 3 * 3 * 16
            utilize = sorted((sum(token) / len(token) for token in tokens), reverse=True)
            retrieve = sorted((sum(entry) / len(tokens) for entry in zip(*tokens, strict=True)), reverse=True)
            for ratio, values in (("utilize", utilize), ("retrieve", retrieve)):
                row = next(rows)
                assert [row[key] for key in ("run", "block", "entries", "tokens", "ratio")] == [
                    name, str(block), str(4 * width), "144", ratio,
                ]  # fmt: skip
                assert float(row["mean"]) == pytest.approx(sum(values) / len(values), rel=1e-9)
                assert float(row["std"]) == pytest.approx(statistics.pstdev(values), rel=1e-6)
                for place in range(101):
                    expected = values[round(place / 100 * (len(values) - 1))]
                    assert float(row[f"sorted_{place:03d}"]) == pytest.approx(expected, rel=1e-9)
            seldom = sum(value < 0.01 for value in retrieve) / len(retrieve)
            assert float(row["seldom"]) == pytest.approx(seldom, abs=1e-12)
            means.append(sum(utilize) / len(utilize))
        assert f"{name}: {100 * sum(means) / len(means):.1f}% of the entries are activated" in done.said
    assert next(rows, None) is None
    assert Image.open(done.out / "utilization.png").width > 1000


def test_blocks_without_ffn_are_left_out(analyse: Analyse, focus) -> None:
    from pretrain.sampling.pruning import without_ffns

    focus.register_modules(transformer=type(focus.transformer).of(without_ffns(focus.transformer.dit, [0])))
    done = analyse("utilization", [focus])
    assert {row["block"] for row in done.rows} == {str(k) for k in range(1, focus.transformer.dit.config.depth)}


def test_nans_are_shown(analyse: Analyse, plain) -> None:
    with torch.no_grad():
        plain.transformer.dit.block(1).ffn.key.bias[3] = math.nan
    done = analyse("utilization", [plain])
    sound, utilize, retrieve = done.rows[0], done.rows[2], done.rows[3]
    # What the first step predicts is NaN, so that every token of block 1, and of later steps' block 0, has a NaN.
    assert math.isnan(float(utilize["mean"])) and math.isnan(float(utilize["sorted_100"]))
    assert math.isnan(float(retrieve["sorted_000"])) and math.isnan(float(retrieve["seldom"]))
    assert math.isnan(float(sound["mean"])) and not math.isnan(float(sound["sorted_100"]))


def test_a_tally_of_one_damaged_entry() -> None:
    """The other entries keep their figures."""
    keys = torch.tensor([[[1.0, -1.0, 2.0], [math.nan, 1.0, -1.0], [-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]])
    tally = Tally(3, keys.device)
    tally.add(keys[:, :2])
    tally.add(keys[:, 2:])
    values, mean, std = tally.utilize([0, 1 / 3, 2 / 3, 1])
    assert values[1:] == pytest.approx([1, 2 / 3, 0]) and math.isnan(values[0] + mean) and math.isnan(std)
    values, mean, _ = tally.retrieve([0, 0.5, 1])
    assert values[1:] == [0.5, 0.5] and math.isnan(values[0]) and math.isnan(mean)


def test_its_memory_does_not_grow_with_tokens() -> None:
    tally = Tally(64, torch.device("cpu"))
    before = [tensor.numel() for tensor in (tally.by_active, tally.by_entry, tally.damaged)]
    for _ in range(4):
        tally.add(torch.randn(2, 1000, 64))
    assert before == [tensor.numel() for tensor in (tally.by_active, tally.by_entry, tally.damaged)]
    assert tally.tokens == 8000 == tally.by_active.sum()


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        (["--label", "one"], "--label one: expected a different name for each of 2 runs"),
        (["--pictures", "0"], "--pictures 0: must be at least 1"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
    ],
)
def test_bad_options_are_one_line(analyse: Analyse, plain, focus, words, mend) -> None:
    done = analyse("utilization", [plain, focus], *words)
    assert done.code == 1 and done.errors == [f"analyze: {mend}"]
