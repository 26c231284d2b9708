"""Table of presets: parameters by part and FLOPs per image, beside the paper's figures."""

from __future__ import annotations

from dataclasses import replace

from data_prep.encoders import DOWNSAMPLE
from pretrain.models.cost import count_flops, count_parameters, grid_of
from pretrain.models.presets import PRESETS

PAPER = {  # total parameters that the paper (§5) prints
    "dit_1b": "1.078B",
    "focusdit_1b": "(3D: the text's default; no total printed)",
    "focusdit_1b_shared2d": "1.023B",
}


def table(text_tokens: int) -> str:
    """The table as text."""
    head = (
        f"{'preset':<22}{'attention':>11}{'ffn':>11}{'query mask':>12}{'rest':>10}{'total':>11}"
        f"{'256 px':>11}{'512 px':>11}  paper"
    )
    lines = [head, "-" * len(head)]
    for name, config in PRESETS.items():
        p = count_parameters(config)
        flops = [count_flops(config, grid_of(config, side, DOWNSAMPLE), text_tokens).total for side in (256, 512)]
        parts = (
            f"{_millions(p.attention):>11}{_millions(p.ffn):>11}{_millions(p.query_mask):>12}{_millions(p.rest):>10}"
        )
        lines.append(
            f"{name:<22}{parts}{_millions(p.total):>11}{flops[0] / 1e9:>9.1f} G{flops[1] / 1e9:>9.1f} G  "
            f"{PAPER.get(name, '')}"
        )
    return "\n".join(lines)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M"


def notes() -> str:
    """The relation of the presets to the paper's sums, as text."""
    base = PRESETS["dit_1b"]
    uniform = count_parameters(base).ffn
    saving = {s: uniform - count_parameters(replace(base, ffn="shared", shared_width=s)).ffn for s in (1, 2, 3)}
    mask = {k: count_parameters(replace(base, mask=k)).query_mask for k in ("release", "adaln_single")}
    return "\n".join(
        [
            f"Q-MaskGen: release {mask['release'] / 1e9:.4f}B (paper: 0.199B), adaln_single {mask['adaln_single'] / 1e9:.4f}B",
            "Vocabulary Redistribution saves "
            + ", ".join(f"{v / 1e9:.4f}B at a shared expert of {s}D" for s, v in saving.items())
            + " (paper: 0.254B, which is 2D; its text names 3D the default)",
        ]
    )
