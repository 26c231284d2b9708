"""less: methods that train for less, each alone and together, beside the plain run (docs/train_for_less.md).

Each at equal images, at equal FLOPs and in equal seconds, by the time that a step of its took with the same seed. Muon, whose
update is not counted, and alignment, but for its small projection, take the plain run's FLOPs: equal images say it for both. At
`large` the methods are those that a 1B run would use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pretrain.ablate.study import ON_SHAPES, Row, Scale, Study

MUON, TREAD = ("optimizer.name=muon", "optimizer.lr={muon_lr}"), ("routing.name=tread",)
SPRINT = ("routing.name=sprint", "routing.share=0.75", "model.fusion={fusion}")
ALIGNED = ("alignment.weight=0.5", "alignment.hidden={alignment_hidden}")
SECONDS: tuple[Literal["flops", "seconds"], ...] = ("seconds",)
BOTH: tuple[Literal["flops", "seconds"], ...] = ("flops", "seconds")
METHODS = {
    "muon": ("Muon", MUON, SECONDS),
    "tread": ("TREAD, half of the tokens", TREAD, BOTH),
    "tread_quarter": ("TREAD, a quarter of the tokens", (*TREAD, "routing.share=0.75"), BOTH),
    "sprint": ("SPRINT, a quarter of the tokens", SPRINT, BOTH),
    "deferred": ("deferred masking, half of the tokens", ("routing.name=deferred_masking",), BOTH),
    "aligned": ("alignment (REPA)", ALIGNED, SECONDS),
    "together": ("Muon and SPRINT", (*MUON, *SPRINT), BOTH),
}

ROWS = {"plain": Row("AdamW, all tokens", None)}
for name, (label, settings, equals) in METHODS.items():
    ROWS[name] = Row(f"{label}, equal images", "plain", settings)
    for equal in equals:
        words = {"flops": "equal FLOPs", "seconds": "equal seconds"}[equal]
        ROWS[f"{name}_{equal}"] = replace(ROWS[name], label=f"{label}, {words}", equal=equal, timed_by=name)

STUDY = Study(
    "Training for less",
    ROWS,
    {
        "tiny": Scale(
            "demo_256",
            (
                *("model.preset=dit_tiny_deep", "model.mask=adaln_single", "model.ffn=shared", *ON_SHAPES),
                *("optimizer.name=adamw", "optimizer.lr=2.5e-3", "steps=150"),
            ),
            words={"muon_lr": "4e-3", "alignment_hidden": "128", "fusion": "[2,6]"},
            seeds=(0, 1, 2),
            prompts=128,
            about="2.1M parameters on captioned shapes",
        ),
        "large": Scale(
            "stage1_256",
            ("steps=30000",),
            words={"muon_lr": "2e-4", "alignment_hidden": "2048", "fusion": "[2,26]"},
            seeds=(0,),
            prompts=0,
            caption_tokens=None,
            about="stage1_256 on data of your own; give --prompts and --metrics",
        ),
    },
)
