"""A study: its rows, and the scales at which it runs.

All rows of a seed see the same samples in the same order, with the same noise and times: both follow from the seed, the epoch
and the sample's key (pretrain/diffusion/random_numbers.py). So rows are compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pretrain.demo import HELD_OUT

DATA, PICTURES, PER_TAR = "data/ablation", 2400, 250  # captioned shapes, for 256 px alone
SHAPES_CAPTION = 12  # tokens of a caption of theirs, about
# What all studies of them have in common, over the demo's config: the preset's heads, positions by token, and guidance.
ON_SHAPES = (
    *(f"data.path={DATA}", HELD_OUT, "preview.every=0", "model.heads=null", "model.position_scale=1"),
    *("data.caption_dropout=0.1", "preview.guidance=3"),
)


@dataclass(frozen=True)
class Row:
    """A row of a study.

    Attributes:
        label: in the table.
        before: the row that it is compared with; None for the first.
        settings: the config's overrides by which it differs from the study's baseline; `{key}` stands for a scale's word.
        trained_as: the row whose training it takes, with other ways of drawing; None trains its own.
        drawing: options of `pretrain.evaluate`.
        prune: draw without the scale's number of FFNs that the masks weigh least.
        equal: images: as many steps as the first row; flops: as many forward and backward FLOPs; seconds: as long as the first
            row's steps take, by the measured time of a step of the row `timed_by`, which has the same settings.
        paper: what the source reports, by figure.
    """

    label: str
    before: str | None
    settings: tuple[str, ...] = ()
    trained_as: str | None = None
    drawing: tuple[str, ...] = ()
    prune: bool = False
    equal: Literal["images", "flops", "seconds"] = "images"
    timed_by: str | None = None
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """A size at which a study runs.

    Attributes:
        config: the stage that all rows train.
        settings: overrides that all rows share.
        words: what stands for the rows' `{key}`.
        seeds: of the trainings.
        prune: FFNs that the pruned rows go without.
        prompts: captioned shapes that are drawn and judged by the checker; 0: the user gives prompts and metrics.
        about: what it is made for.
        caption_tokens: of a caption, about, for FLOPs; None: of captions of photographs (models/cost.py).
    """

    config: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    prompts: int
    about: str
    words: Mapping[str, str] = field(default_factory=dict)
    prune: int = 0
    caption_tokens: int | None = SHAPES_CAPTION


@dataclass(frozen=True)
class Study:
    """Rows by name, in the table's order, and scales by name."""

    title: str
    rows: Mapping[str, Row]
    scales: Mapping[str, Scale]

    def settings(self, row: str, scale: Scale, seed: int) -> list[str]:
        """The overrides of a row's training."""
        own = [setting.format(**scale.words) for setting in self.rows[row].settings]
        return [*scale.settings, *own, f"seed={seed}"]
