"""FlexDiT: on how many tokens each block computes (arXiv 2412.06028; published as SparseDiT).

Blocks by role, from bottom to top:

    pooling                                 attention is the mean over all tokens
    generate, sparse × s, recover, dense    a Sparse-Dense Token Module, several of them
    dense                                   ordinary blocks

`generate` pools the tokens to a coarser grid, `sparse` blocks compute there, `recover` brings what they found back to all
tokens. How coarse the grid is follows from the noise level t (0 is data, 1 noise): of R × C tokens
round(R·√(1 − r)) × round(C·√(1 − r)) are left, where the removed share r rises from r_min at data to r_max at noise, in
four bins of t: r_min below 1/4, then linear at the bins' upper ends.
"""

from __future__ import annotations

import math

from pretrain.models.grids import Grid

DENSITIES = ("dense", "flexdit")
BINS = 4

POOLING, GENERATE, SPARSE, RECOVER, DENSE = "pooling", "generate", "sparse", "recover", "dense"

# Pooling blocks, modules, sparse blocks in each, dense blocks on top.
Split = tuple[int, int, int, int]

# By depth. 28 blocks are DiT-XL's at 512 px; the paper's 256 px model has (1, 4, 3, 3). 12 blocks, DiT-B's: a reading.
SPLITS: dict[int, Split] = {8: (1, 1, 3, 1), 12: (1, 2, 2, 1), 28: (2, 4, 3, 2)}


def blocks_of(split: Split) -> int:
    """The depth that a split makes up."""
    pooling, modules, sparse, top = split
    return pooling + modules * (sparse + 3) + top


def split_of(depth: int, split: Split | None) -> Split:
    """The split asked for, or the table's. Raises ValueError where there is none, or it makes up another depth."""
    found = SPLITS.get(depth) if split is None else split
    what = "it is [pooling blocks, modules, sparse blocks in each, dense blocks on top]"
    sum_ = "pooling + modules × (sparse + 3) + top"
    if found is None:
        known = ", ".join(map(str, SPLITS))
        raise ValueError(
            f"no split is known for {depth} blocks (only for {known}); give one whose {sum_} is {depth}: {what}"
        )
    if len(found) != 4 or min(found) < 0 or found[1] < 1 or found[2] < 1:
        raise ValueError(
            f"{list(found)}: expected four numbers, one module with one sparse block at least, and nothing below 0: {what}"
        )
    if blocks_of(found) != depth:
        raise ValueError(f"{list(found)} makes {blocks_of(found)} blocks ({sum_}), but depth is {depth}: {what}")
    return found


def roles(density: str, depth: int, split: Split | None) -> tuple[str, ...]:
    """Each block's role. Raises ValueError as `split_of`."""
    if density == "dense":
        return (DENSE,) * depth
    pooling, modules, sparse, top = split_of(depth, split)
    module = (GENERATE, *(SPARSE,) * sparse, RECOVER, DENSE)
    return (POOLING,) * pooling + module * modules + (DENSE,) * top


def bin_of(t: float) -> int:
    """The bin of a noise level in 0..1."""
    return min(max(int(t * BINS), 0), BINS - 1)


def removed(sparsity: tuple[float, float], bin_: int) -> float:
    """r of a bin."""
    low, high = sparsity
    return low + (high - low) * bin_ / (BINS - 1)


def sparse_grid(grid: Grid, sparsity: tuple[float, float], bin_: int) -> Grid:
    """The coarser grid in a bin. Raises ValueError where nothing would be left of a side."""
    r = removed(sparsity, bin_)
    rows, columns = (round(side * math.sqrt(1 - r)) for side in grid)
    if min(rows, columns) < 1:
        raise ValueError(
            f"sparsity: {r:.2f} of {grid[0]} × {grid[1]} tokens removed leaves {rows} × {columns}; "
            "lower it, or use larger pictures"
        )
    return rows, columns
