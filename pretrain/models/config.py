"""A backbone's shape: everything that decides which parameters there are, and what a forward pass computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from pretrain.models.embeddings import ROTARY_PARTS, Scale
from pretrain.models.focusdit import ffn, mask
from pretrain.models.grids import Grid
from pretrain.models.mixers import ATTENTIONS, DENSITIES
from pretrain.models.mixers.base import Attention, Density, Method
from pretrain.models.mixers.flexdit import FlexDiTSection
from pretrain.models.mixers.mediators import MediatorsSection

M = TypeVar("M", bound=Method)


@dataclass(frozen=True)
class DiTConfig:
    """A backbone's shape. `pretrain.config.ModelSection`, a config's `model`, has the same fields."""

    width: int
    """D: the width of a token; divisible by the heads."""
    heads: int
    """Attention heads."""
    depth: int
    """Blocks."""
    patch: int
    """A token is patch × patch latent pixels."""
    latent_channels: int
    """C: channels of the VAE's latents."""
    text_width: int
    """E: the text encoder's width; 0 leaves text out (an unconditional model)."""
    mask: str = "none"
    """Query mask: none | release | adaln_single (focusdit/mask.py)."""
    ffn: str = "uniform"
    """FFN vocabulary: uniform | shared | tapered (focusdit/ffn.py)."""
    shared_width: int = 2
    """Entries of the shared expert of `ffn: shared`, in widths D (1, 2 or 3)."""
    attention: str = "full"
    """Attention in the blocks that hold all tokens: full | mediators (mixers/)."""
    mediators: MediatorsSection = field(default_factory=MediatorsSection)
    """Settings of `attention: mediators`."""
    density: str = "dense"
    """Tokens that the blocks compute on: dense (all) | flexdit (fewer in the middle of the network; mixers/)."""
    flexdit: FlexDiTSection = field(default_factory=FlexDiTSection)
    """Settings of `density: flexdit`."""
    rotary: str = "halves"
    """Parts of a head that positions turn: halves (row, column) | thirds (time, row, column) | release (thirds, rounded)."""
    absolute: str = "none"
    """Positions added to the tokens: none (the authors' release) | sincos (PixArt-alpha)."""
    position_scale: Scale = 1.0
    """Divisor of the positions; 2 lets 512 px start from what 256 px learned. One number, or one for rows and one for columns."""
    mask_hidden: tuple[int, ...] = (512, 128, 32, 16)
    """Hidden widths of the query mask's MLP."""
    mask_previous: bool = True
    """The query mask of the block before is an input of a block's own."""
    mask_dropout: float = 0.1
    """Dropout of the query mask while training (`mask.dropout_factors`)."""
    norm_eps: float = 1e-6
    """Epsilon of the blocks' LayerNorms."""
    fusion: tuple[int, int] | None = None
    """[first, last]: what blocks first … last − 1 add joins the tokens before them by a trained projection, for
    `routing.name=sprint` (fusion.py); None leaves it out."""
    removed_ffns: tuple[int, ...] = ()
    """Numbers of the blocks whose FFN was pruned away; their query masks stay, as the next blocks read them."""

    @property
    def methods(self) -> tuple[Attention, Density]:
        """The methods that mix image tokens, bound to this shape."""
        return self._bind(ATTENTIONS[self.attention]), self._bind(DENSITIES[self.density])

    @property
    def open_methods(self) -> tuple[Method, ...]:
        """The methods that leave a choice to the compute budget."""
        return tuple(method for method in self.methods if method.choices)

    def _bind(self, method: type[M]) -> M:
        section = getattr(self, method.section_name) if method.section_name else None
        return method(self.width, self.heads, self.depth, section)

    def problems(self) -> list[str]:
        """Reasons why this shape cannot be built, each with the mend."""
        found = []
        tables = (
            ("mask", mask.KINDS),
            ("ffn", ffn.LAYOUTS),
            ("attention", tuple(ATTENTIONS)),
            ("density", tuple(DENSITIES)),
            ("rotary", tuple(ROTARY_PARTS)),
            ("absolute", ("none", "sincos")),
        )
        for name, known in tables:
            if getattr(self, name) not in known:
                found.append(f"{name}: {getattr(self, name)!r} is none of {', '.join(known)}")
        for name in ("width", "heads", "depth", "patch", "latent_channels", "norm_eps"):
            if getattr(self, name) <= 0:
                found.append(f"{name}: {getattr(self, name)} must be above 0")
        if self.text_width < 0:
            found.append(f"text_width: {self.text_width} must be the text encoder's width, or 0 for no text")
        if self.attention in ATTENTIONS:
            found += self._bind(ATTENTIONS[self.attention]).problems()
        if self.density in DENSITIES:
            found += self._bind(DENSITIES[self.density]).problems()
        return found + self._position_problems() + self._ffn_problems() + self._fusion_problems()

    def _position_problems(self) -> list[str]:
        found = []
        scales = self.position_scale if isinstance(self.position_scale, tuple) else (self.position_scale,) * 2
        if len(scales) != 2 or min(scales) <= 0:
            found.append(
                f"position_scale: {self.position_scale} must be one number above 0, or one for rows and one for columns"
            )
        if self.absolute == "sincos" and self.width % 4:
            found.append(f"width: {self.width} must be divisible by 4 (sines and cosines of row and column)")
        parts = 2 * len(ROTARY_PARTS.get(self.rotary, ()))
        if parts and self.width > 0 and self.heads > 0 and self.width % (self.heads * parts):
            found.append(
                f"width: {self.width} must be divisible by heads × {parts} = {self.heads * parts} "
                f"(rotary {self.rotary} turns pairs in {parts // 2} parts of each head)"
            )
        return found

    def _ffn_problems(self) -> list[str]:
        found, removed = [], self.removed_ffns
        if len(set(removed)) < len(removed) or not all(0 <= block < self.depth for block in removed):
            found.append(f"removed_ffns: {list(removed)} must be different blocks of 0..{self.depth - 1}")
        if self.ffn == "shared" and self.shared_width not in (1, 2, 3):
            found.append(f"shared_width: {self.shared_width} must be 1, 2 or 3 (widths D of the 4D entries)")
        if not 0 <= self.mask_dropout < 1:
            found.append(f"mask_dropout: {self.mask_dropout} must be in [0, 1)")
        return found

    @property
    def usual_fusion(self) -> list[int]:
        """SPRINT's blocks [first, last]: two blocks of all tokens at either end, fewer in shallow models."""
        ends = min(2, self.depth // 4)
        return [ends, self.depth - ends]

    def _fusion_problems(self) -> list[str]:
        if self.fusion is None:
            return []
        found, blocks = [], list(self.fusion)
        if len(blocks) != 2 or not 0 <= blocks[0] < blocks[1] <= self.depth:
            found.append(
                f"fusion: {blocks} must be two blocks with 0 ≤ first < last ≤ {self.depth}, the depth, such as "
                f"{self.usual_fusion}"
            )
        for name, alone in (("attention", "full"), ("density", "dense")):
            if getattr(self, name) != alone:
                found.append(
                    f"fusion: it goes with {name}={alone} alone, not with {getattr(self, name)}; leave one of them out"
                )
        return found

    def grid_problems(self, grid: Grid) -> list[str]:
        """Reasons why a shape without problems cannot compute on (rows, columns) of tokens."""
        return [problem for method in self.methods for problem in method.grid_problems(grid)]


# The fields of earlier versions, in exports and runs, and where they are now.
RENAMED_FIELDS = {"split": ("flexdit", "split"), "sparsity": ("flexdit", "sparsity")}


def upgrade_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `DiTConfig` as an earlier version wrote them, in today's form."""
    upgraded = {name: value for name, value in fields.items() if name not in RENAMED_FIELDS}
    if isinstance(upgraded.get("mediators"), list | tuple):
        upgraded["mediators"] = {"numbers": upgraded["mediators"]}
    for name, (section, field_) in RENAMED_FIELDS.items():
        if fields.get(name) is not None:
            upgraded[section] = {**(upgraded.get(section) or {}), field_: fields[name]}
    return upgraded
