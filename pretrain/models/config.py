"""A backbone's shape: everything that decides which parameters there are, and what a forward pass computes."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.models.embeddings import ROTARY_PARTS, Scale
from pretrain.models.focusdit import ffn, mask
from pretrain.models.grids import Grid, square
from pretrain.models.mixers import flexdit as density
from pretrain.models.mixers import full as attention
from pretrain.models.mixers.flexdit import Split


@dataclass(frozen=True)
class DiTConfig:
    """A backbone's shape.

    Attributes:
        width: D.
        heads: attention heads; `width` must be divisible by them.
        depth: blocks.
        patch: a token is patch × patch latent pixels.
        latent_channels: C of the VAE.
        text_width: E of the text encoder; 0 leaves text out: an unconditional model.
        mask: query mask: none | release | adaln_single.
        ffn: vocabulary layout: uniform | shared | tapered.
        attention: full | mediators (mediators.py), in the blocks that hold all tokens.
        mediators: their numbers n, each the square of a whole number, the fewest first.
        density: dense | flexdit (density.py).
        split: of `density: flexdit`: pooling blocks, modules, sparse blocks in each, dense blocks on top; None for the
            table's.
        sparsity: of `density: flexdit`: the share of tokens removed at data, and at noise.
        shared_width: entries of the shared expert, in widths D (1, 2 or 3); only for `ffn: shared`.
        rotary: what the head's width turns by: halves (row, column) | thirds (time, row, column).
        absolute: positions added to the tokens: none (the release) | sincos (PixArt-alpha).
        position_scale: positions are divided by it; one number, or one for rows and one for columns.
        mask_hidden: hidden widths of the query mask's MLP.
        mask_dropout: dropout of the mask itself while training; the trainer draws it (`mask.draw_keep`).
        norm_eps: of the blocks' LayerNorms.
        removed_ffns: numbers of the blocks whose FFN was pruned away; their query masks stay, as the next ones read them.
    """

    width: int
    heads: int
    depth: int
    patch: int
    latent_channels: int
    text_width: int
    mask: str = "none"
    ffn: str = "uniform"
    attention: str = "full"
    mediators: tuple[int, ...] = (4, 16, 64)
    density: str = "dense"
    split: Split | None = None
    sparsity: tuple[float, float] = (0.61, 0.86)
    shared_width: int = 2
    rotary: str = "halves"
    absolute: str = "none"
    position_scale: Scale = 1.0
    mask_hidden: tuple[int, ...] = (512, 128, 32, 16)
    mask_dropout: float = 0.1
    norm_eps: float = 1e-6
    removed_ffns: tuple[int, ...] = ()

    def problems(self) -> list[str]:
        """Everything that keeps this shape from being built, each with the mend."""
        found = []
        choices = (
            ("mask", mask.KINDS),
            ("ffn", ffn.LAYOUTS),
            ("attention", attention.KINDS),
            ("density", density.DENSITIES),
            ("rotary", tuple(ROTARY_PARTS)),
            ("absolute", ("none", "sincos")),
        )
        for field, names in choices:
            if getattr(self, field) not in names:
                found.append(f"{field}: {getattr(self, field)!r} is none of {', '.join(names)}")
        for field in ("width", "heads", "depth", "patch", "latent_channels", "norm_eps"):
            if getattr(self, field) <= 0:
                found.append(f"{field}: {getattr(self, field)} must be above 0")
        if self.text_width < 0:
            found.append(f"text_width: {self.text_width} must be the text encoder's width, or 0 for no text")
        found += self._neighbours_problems()
        scales = self.position_scale if isinstance(self.position_scale, tuple) else (self.position_scale,) * 2
        if len(scales) != 2 or min(scales) <= 0:
            found.append(
                f"position_scale: {self.position_scale} must be one number above 0, or one for rows and one for columns"
            )
        removed = self.removed_ffns
        if len(set(removed)) < len(removed) or not all(0 <= block < self.depth for block in removed):
            found.append(f"removed_ffns: {list(removed)} must be different blocks of 0..{self.depth - 1}")
        if self.absolute == "sincos" and self.width % 4:
            found.append(f"width: {self.width} must be divisible by 4 (sines and cosines of row and column)")
        if self.ffn == "shared" and self.shared_width not in (1, 2, 3):
            found.append(f"shared_width: {self.shared_width} must be 1, 2 or 3 (widths D of the 4D entries)")
        if not 0 <= self.mask_dropout < 1:
            found.append(f"mask_dropout: {self.mask_dropout} must be in [0, 1)")
        parts = 2 * len(ROTARY_PARTS.get(self.rotary, ()))
        if parts and self.width > 0 and self.heads > 0 and self.width % (self.heads * parts):
            found.append(
                f"width: {self.width} must be divisible by heads × {parts} = {self.heads * parts} "
                f"(rotary {self.rotary} turns pairs in {parts // 2} parts of each head)"
            )
        return found

    def _neighbours_problems(self) -> list[str]:
        """Those of mediators and density."""
        found = []
        if self.attention == "mediators":
            for n in self.mediators:
                try:
                    square(n)
                except ValueError as error:
                    found.append(f"mediators: {error}")
            if not self.mediators or list(self.mediators) != sorted(set(self.mediators)):
                found.append(f"mediators: {list(self.mediators)} must be different numbers, the fewest first")
        if self.density == "flexdit":
            try:
                density.split_of(self.depth, self.split)
            except ValueError as error:
                found.append(f"split: {error}")
            if len(self.sparsity) != 2 or not 0 < self.sparsity[0] <= self.sparsity[1] < 1:
                found.append(
                    f"sparsity: {list(self.sparsity)} must be two shares above 0 and below 1, the first not above the second"
                )
        return found

    def grid_problems(self, grid: Grid) -> list[str]:
        """What keeps a shape without problems from computing on (rows, columns) of tokens."""
        found = []
        if self.attention == "mediators":
            most = square(self.mediators[-1])[0]
            if most > min(grid):
                found.append(
                    f"mediators: {self.mediators[-1]} ({most} × {most}) do not fit {grid[0]} × {grid[1]} tokens; "
                    "leave out the largest, or use larger pictures"
                )
        if self.density == "flexdit":
            try:
                density.sparse_grid(grid, self.sparsity, density.BINS - 1)
            except ValueError as error:
                found.append(str(error))
        return found
