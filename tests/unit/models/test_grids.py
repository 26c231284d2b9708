"""Coarser grids against torch's own pooling and upsampling, and written out.

Letters: B images, N tokens of a grid, n of its cells, X any width.
"""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.grids import Grid, averages, centres, pool, spread, square

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS = [
    ((16, 16), (10, 10)),
    ((16, 16), (4, 4)),
    ((32, 32), (9, 9)),
    ((5, 7), (3, 2)),
    ((12, 8), (1, 8)),
    ((3, 5), (3, 5)),
]


def image(x_BNX: Tensor, grid: Grid) -> Tensor:
    return x_BNX.transpose(1, 2).unflatten(2, grid)


def tokens(x_BXRC: Tensor) -> Tensor:
    return x_BXRC.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("grid", "cells"), GRIDS)
def test_pooling_is_torchs_adaptive_average(grid, cells):
    x = torch.randn(2, math.prod(grid), 3, dtype=torch.float64)
    expected = tokens(F.adaptive_avg_pool2d(image(x, grid), cells))
    torch.testing.assert_close(pool(x, grid, cells), expected, rtol=0, atol=1e-7)  # the shares are in fp32


@pytest.mark.parametrize(("grid", "cells"), GRIDS)
def test_spreading_takes_torchs_nearest(grid, cells):
    x = torch.randn(2, math.prod(cells), 3)
    assert torch.equal(spread(x, cells, grid), tokens(F.interpolate(image(x, cells), grid, mode="nearest")))


def test_every_side_up_to_64_is_torchs():
    for side, cells in product(range(1, 65), range(1, 65)):
        if cells <= side:
            line = torch.randn(1, 1, side)
            mean = averages(side, cells) @ line[0, 0]
            torch.testing.assert_close(mean, F.adaptive_avg_pool1d(line, cells)[0, 0])


def test_every_side_up_to_64_spreads_to_the_cell_over_its_start():
    for side, cells in product(range(1, 65), range(1, 65)):
        if cells <= side:
            values = torch.arange(cells)[None, :, None]
            expected = [math.floor(i * cells / side + 1e-9) for i in range(side)]
            assert spread(values, (1, cells), (1, side)).flatten().tolist() == expected


def test_gradients_of_both_are_torchs():
    grid, cells = (7, 5), (3, 2)
    for ours, torchs, size, of in (
        (lambda x: pool(x, grid, cells), lambda x: F.adaptive_avg_pool2d(x, cells), grid, cells),
        (lambda x: spread(x, cells, grid), lambda x: F.interpolate(x, grid, mode="nearest"), cells, grid),
    ):
        x = torch.randn(2, math.prod(size), 3, requires_grad=True)
        weight = torch.randn(2, math.prod(of), 3)
        mine, theirs = (
            torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours(x), tokens(torchs(image(x, size))))
        )
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_of_ones_is_one(dtype):
    """A query mask of ones crosses every scale as it is."""
    for grid, cells in GRIDS:
        pooled = pool(torch.ones(1, math.prod(grid), 1, dtype=dtype), grid, cells)
        assert pooled.dtype == dtype
        torch.testing.assert_close(pooled, torch.ones_like(pooled), rtol=0, atol=1e-6)


def test_the_same_grid_is_left_alone():
    x = torch.randn(1, 12, 3)
    assert pool(x, (3, 4), (3, 4)) is x
    assert spread(x, (3, 4), (3, 4)) is x


def test_centres_are_the_mean_places_of_the_cells():
    cpu = torch.device("cpu")
    assert centres(8, 8, cpu).tolist() == list(range(8))
    assert centres(8, 4, cpu).tolist() == [0.5, 2.5, 4.5, 6.5]
    assert centres(5, 2, cpu).tolist() == pytest.approx([1, 3])  # tokens 0, 1, 2 and 2, 3, 4
    for side, cells in product((5, 16, 31), (1, 3, 5)):
        at = centres(side, cells, cpu)
        torch.testing.assert_close(at + at.flip(0), torch.full_like(at, side - 1))


def test_square():
    assert [square(n) for n in (1, 4, 16, 64, 81)] == [(1, 1), (2, 2), (4, 4), (8, 8), (9, 9)]


@pytest.mark.parametrize("cells", [-4, 0, 2, 15, 63])
def test_refuses_what_is_no_square(cells):
    with pytest.raises(ValueError, match=rf"^{cells} is not the square of a whole number$"):
        square(cells)
