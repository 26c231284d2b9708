"""Operations against torch's own counts and cost.py's, kernels by hand, and the table."""

import json
from dataclasses import replace

import pytest
import torch

from pretrain.bench.__main__ import main
from pretrain.bench.kernels import (
    ATTENTION,
    ELEMENTWISE,
    MATRIX,
    PARTS,
    ROWS,
    Operation,
    Site,
    eager,
    fused,
    record_step,
    touched,
)
from pretrain.bench.roofline import FP8_SHARE, KERNEL_SECONDS, MATRIX_SHARE, MEMORY_SHARE, seconds_of
from pretrain.gpus import GPUS
from pretrain.models import preset
from pretrain.models.budget_choices import default_budget
from pretrain.models.cost import count_flops

GRID, LENGTHS = (4, 4), [3, 5]


@pytest.fixture(scope="module")
def operations():
    return record_step(preset("focusdit_tiny"), GRID, LENGTHS)


def flops(operations, backward, part=None):
    return sum(o.flops for o in operations if o.backward == backward and part in (None, o.site.part))


def test_forward_flops_are_those_that_cost_counts(operations):
    """Attention sees the captions padded to the longest."""
    c = preset("focusdit_tiny")
    counted = sum(count_flops(c, GRID, length).total for length in LENGTHS)
    padding = c.depth * 4 * 16 * c.width * (2 * max(LENGTHS) - sum(LENGTHS))
    assert flops(operations, backward=False) == counted + padding


@pytest.mark.parametrize("part", ["FFN", "query mask"])
def test_a_backward_product_has_two_for_each(operations, part):
    assert flops(operations, backward=True, part=part) == 2 * flops(operations, backward=False, part=part)


def test_backward_attention_computes_its_matrix_again(operations):
    counts = {b: sum(o.flops for o in operations if o.kind == ATTENTION and o.backward == b) for b in (False, True)}
    assert counts[True] == 2.5 * counts[False] > 0


def test_every_part_of_every_block_is_met(operations):
    found = {(o.site.block, o.site.part, o.backward) for o in operations}
    assert {(block, part, b) for block in (0, 1) for part in PARTS[:-1] for b in (False, True)} <= found


@pytest.mark.parametrize("changes", [{"attention": "mediators"}, {"density": "flexdit"}, {"ffn": "tapered"}])
def test_methods_are_counted_at_a_noise_level(changes):
    c = replace(preset("dit_tiny_deep"), **changes)
    found = record_step(c, (8, 8), [5], level=0.1)
    expected = count_flops(c, (8, 8), 5, default_budget(c, 0.1)).total
    assert flops(found, backward=False) == pytest.approx(expected, rel=0.02), "pooling is no matrix product"


def test_expanded_dimensions_are_touched_once():
    assert touched(torch.zeros(3, 1, 5).expand(3, 7, 5)) == 3 * 5 * 4
    assert touched(torch.zeros(3, 5).bfloat16()) == 3 * 5 * 2


def operation(name, reads, writes, kind=ELEMENTWISE, backward=False):
    return Operation(name, kind, Site(), backward, 0.0, reads, writes)


X, Y, A, B, C, D, E, F = range(8)  # tensors


def test_neighbours_are_one_kernel_and_write_what_others_read():
    """a = f(x); b = g(a, y); c = b @ b; d = h(c, x): a is never in memory."""
    found = fused(
        [
            operation("f", {X: 10}, {A: 10}),
            operation("g", {A: 10, Y: 7}, {B: 10}),
            operation("mm", {B: 10}, {C: 5}, MATRIX),
            operation("h", {C: 5, X: 10}, {D: 5}),
        ]
    )
    assert [(k.bytes_read, k.bytes_written) for k in found] == [(17, 10), (10, 5), (15, 5)]
    assert [k.operations for k in found] == [("g",), ("mm",), ("h",)]


def test_the_backward_pass_computes_again_what_is_not_kept():
    """a = f(x) is read by h in the backward pass, which reads x and the gradient in its place."""
    found = fused(
        [
            operation("f", {X: 10}, {A: 20}),
            operation("g", {A: 20}, {B: 10}),
            operation("mm", {B: 10}, {C: 5}, MATRIX),
            operation("h", {C: 5, A: 20}, {D: 20}, backward=True),
        ]
    )
    assert [(k.bytes_read, k.bytes_written) for k in found] == [(10, 10), (10, 5), (15, 20)]


def test_sums_over_rows_are_kernels_of_their_own():
    """a = f(x) goes into two sums and a product: written once, read by all; b = g(x) into a sum alone: not written."""
    found = fused(
        [
            operation("f", {X: 10}, {A: 10}),
            operation("g", {X: 10}, {B: 30}),
            operation("sum", {A: 10}, {C: 1}, ROWS),
            operation("sum", {B: 30}, {D: 1}, ROWS),
            operation("mm", {A: 10}, {E: 5}, MATRIX),
        ]
    )
    assert [(k.bytes_read, k.bytes_written) for k in found] == [(10, 10), (10, 1), (10, 1), (10, 5)]


def test_fusing_keeps_the_flops_and_moves_less(operations):
    each, together = eager(operations), fused(operations)
    assert sum(k.flops for k in each) == sum(k.flops for k in together)
    moved = [sum(k.bytes_moved for k in kernels) for kernels in (each, together)]
    assert 0.4 * moved[0] < moved[1] < 0.9 * moved[0]


def test_a_kernel_takes_its_longest_wait():
    h100 = GPUS["h100"]
    assert seconds_of(MATRIX, 989e12 * MATRIX_SHARE, 1, h100) == pytest.approx(1)
    assert seconds_of(MATRIX, 1979e12 * FP8_SHARE, 1, h100, fp8=True) == pytest.approx(1)
    assert seconds_of(MATRIX, 989e12 * MATRIX_SHARE, 2 * 3.35e12 * MEMORY_SHARE, h100) == pytest.approx(2)
    assert seconds_of(ELEMENTWISE, 0, 1, h100) == KERNEL_SECONDS


def test_the_table(capsys, tmp_path):
    words = ["--preset", "focusdit_tiny", "--resolutions", "128", "--batches", "2", "--out", str(tmp_path / "r.json")]
    assert main(["roofline", "--gpu", "h100", *words]) == 0
    said = capsys.readouterr().out
    assert "blocks 0 to 1, each" in said and "computed" in said
    (found,) = json.loads((tmp_path / "r.json").read_text())
    c = preset("focusdit_tiny")
    for way, about in found["ways"].items():
        assert about["seconds"] == pytest.approx(sum(part["seconds"] for part in about["parts"]))
        assert about["mfu"] == pytest.approx(found["model_flops"] / about["seconds"] / 989e12)
        assert f"{about['mfu']:.1%}" in said, way
    assert found["ways"]["compiled"]["seconds"] < found["ways"]["eager"]["seconds"]
    assert found["model_flops"] / 6 == pytest.approx(count_flops(c, (4, 4), 85).total, rel=0.5)
    assert main(["roofline", "--gpu", "a100", *words]) == 0
    assert "fp8" not in capsys.readouterr().out


def test_mistakes_are_told(capsys):
    assert main(["roofline", "--resolutions", "256"]) == 1
    assert "--batches: 2 for 1 resolutions; give one for each" in capsys.readouterr().err
    assert main(["roofline", "--preset", "none"]) == 1
    assert "unknown model preset" in capsys.readouterr().err
