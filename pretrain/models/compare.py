"""Costs of the methods beside each other, at the 1B model's shape, and their papers' figures beside those counted here.

python -m pretrain.models --compare --resolution 256 512 1024
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from data_prep.encoders import DOWNSAMPLE
from pretrain.models.config import DiTConfig
from pretrain.models.cost import CAPTION, count_activations, count_flops, count_parameters, grid_of
from pretrain.models.mixers.flexdit import FlexDiTSection
from pretrain.models.mixers.mediators import MediatorsSection
from pretrain.models.presets import preset

_FOCUSDIT: dict[str, Any] = {"mask": "release", "ffn": "shared", "shared_width": 2}
_FLEXDIT: dict[str, Any] = {"density": "flexdit"}
_MEDIATORS: dict[str, Any] = {"attention": "mediators"}

METHODS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "FocusDiT": _FOCUSDIT,
    "FlexDiT": _FLEXDIT,
    "mediators": _MEDIATORS,
    "FocusDiT + FlexDiT": _FOCUSDIT | _FLEXDIT,
    "FocusDiT + mediators": _FOCUSDIT | _MEDIATORS,
    "all together": _FOCUSDIT | _FLEXDIT | _MEDIATORS,
}


@dataclass(frozen=True)
class Published:
    """A figure that a paper prints.

    Attributes:
        model: as the paper calls it.
        config: its shape here.
        resolution: pixels of the square picture's side.
        text_tokens: 0 for the class-conditional models.
        gmacs: 10⁹ multiply-adds of a forward pass, in the mean over the noise levels.
    """

    model: str
    config: DiTConfig
    resolution: int
    text_tokens: int
    gmacs: float

    def counted(self) -> float:
        """The same, counted here."""
        flops = count_flops(self.config, grid_of(self.config, self.resolution, DOWNSAMPLE), self.text_tokens)
        return flops.total / 2 / 1e9


def _classes(name: str, **changes: Any) -> DiTConfig:
    """A preset without text, as the class-conditional models have none."""
    return replace(preset(name), text_width=0, **changes)


def _fixed(side: int) -> DiTConfig:
    """The published 256 px model with one coarser grid at every noise level."""
    return _classes("flexdit_xl2_256", flexdit=FlexDiTSection(split=(1, 4, 3, 3), grid=(side, side)))


PUBLISHED = (
    Published("DiT-XL/2", _classes("dit_xl2"), 512, 0, 525.0),
    Published(
        "  FlexDiT, sparsity .61 to .86",
        _classes("flexdit_xl2_512", flexdit=FlexDiTSection()),
        512,
        0,
        286.0,
    ),
    Published("  FlexDiT, sparsity .90 to .96", _classes("flexdit_xl2_512"), 512, 0, 235.0),
    Published("DiT-XL/2", _classes("dit_xl2"), 256, 0, 118.6),
    Published("  FlexDiT", _classes("flexdit_xl2_256"), 256, 0, 68.05),
    Published("  FlexDiT, 8 × 8 at every level", _fixed(8), 256, 0, 68.05),
    Published("  FlexDiT, 12 × 12 at every level", _fixed(12), 256, 0, 88.91),
    Published("DiT-B/2", _classes("dit_b2"), 256, 0, 23.0),
    Published("  FlexDiT", _classes("flexdit_b2"), 256, 0, 14.3),
    Published("SiT-S/2", _classes("dit_s2"), 256, 0, 6.06),
    Published("  4 mediators", _classes("mediators_s2", mediators=MediatorsSection((4,))), 256, 0, 5.48),
    Published("  16 mediators", _classes("mediators_s2", mediators=MediatorsSection((16,))), 256, 0, 5.54),
    Published("  64 mediators", _classes("mediators_s2", mediators=MediatorsSection((64,))), 256, 0, 5.76),
    Published("PixArt-alpha", preset("dit_xl2"), 256, 120, 148.7),
    Published("  FlexDiT", preset("flexdit_xl2_256"), 256, 120, 91.6),
)


def compare(resolutions: Iterable[int], text_tokens: int = CAPTION) -> str:
    """Every method at every resolution, as text; a model that cannot do a resolution has the reason in its line."""
    return "\n\n".join(_at(side, text_tokens) for side in resolutions)


def _at(resolution: int, text_tokens: int) -> str:
    base = preset("dit_1b")
    try:
        grid = grid_of(base, resolution, DOWNSAMPLE)
    except ValueError as error:
        return f"not done: {error}"
    head = (
        f"{'':<22}{'parameters':>12}{'FLOPs':>10}{'of baseline':>13}{'n = 4':>11}{'16':>8}{'64':>8}{'activations':>13}"
    )
    lines = [f"{resolution} px, {grid[0]} × {grid[1]} tokens", head, "-" * len(head)]
    baseline = count_flops(base, grid, text_tokens).total
    for name, changes in METHODS.items():
        c = replace(base, **changes)
        start = f"{name:<22}{count_parameters(c).total / 1e6:>11.1f}M"
        if problems := c.grid_problems(grid):
            lines.append(f"{start}  not at {resolution} px: {'; '.join(problems)}")
            continue
        flops = count_flops(c, grid, text_tokens).total
        each = f"{'':>27}"
        if c.attention == "mediators":
            given = [
                count_flops(replace(c, mediators=MediatorsSection((n,))), grid, text_tokens).total
                for n in c.mediators.numbers
            ]
            first, *rest = (f"{f / baseline:.3f}" for f in given)
            each = f"{first:>11}" + "".join(f"{share:>8}" for share in rest)
        kept = count_activations(c, grid, text_tokens) / 2**30
        lines.append(f"{start}{flops / 1e9:>8.1f} G{flops / baseline:>13.3f}{each}{kept:>9.2f} GiB")
    return "\n".join(lines)


def compare_published() -> str:
    """The papers' figures beside those counted here, as text."""
    head = f"{'Beside the published figures':<34}{'':>6}{'published':>12}{'counted':>12}"
    lines = [head, "-" * len(head)]
    for p in PUBLISHED:
        counted = p.counted()
        lines.append(
            f"{p.model:<34}{p.resolution:>3} px{p.gmacs:>10.2f} G{counted:>10.2f} G{100 * (counted / p.gmacs - 1):>+7.1f}%"
        )
    return "\n".join(lines)
