"""neighbours: FocusDiT, FlexDiT (arXiv 2412.06028) and attention mediators (arXiv 2408.05710) beside the plain DiT.

Each at equal images, and once more at equal FLOPs: as many times more steps as a forward pass costs less. docs/neighbours.md
explains the methods.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.ablate.study import Row, Scale, Study
from pretrain.ablate.table3 import TINY

MASKED, FLEXDIT = ("model.mask=adaln_single", "model.ffn=shared"), ("model.density=flexdit",)
METHODS = {
    "FocusDiT": MASKED,
    "FlexDiT": FLEXDIT,
    "mediators": ("model.attention=mediators",),
    "both": (*MASKED, *FLEXDIT),
}
LABELS = {"both": "FocusDiT + FlexDiT"}

ROWS = {"baseline": Row("DiT baseline", None)}
for name, settings in METHODS.items():
    ROWS[name] = Row(f"{LABELS.get(name, name)}, equal images", "baseline", settings)
    ROWS[f"{name}_flops"] = replace(ROWS[name], label=f"{LABELS.get(name, name)}, equal FLOPs", equal="flops")

STUDY = Study(
    "FocusDiT and its neighbours",
    ROWS,
    {
        "tiny": Scale(
            "demo_256",
            TINY,
            seeds=(0, 1, 2),
            prompts=128,
            about="1.9M parameters on captioned shapes: all rows and seeds in about two hours on two cores (not measured)",
        ),
        "large": Scale(
            "stage1_256",
            ("model.preset=dit_xl2", "model.mask=none", "model.ffn=uniform", "steps=30000"),
            seeds=(0,),
            prompts=0,
            caption_tokens=None,
            about="DiT-XL/2 on data of your own; give --prompts and --metrics",
        ),
    },
)
