"""Prints the table of presets: parameters by part and FLOPs per image, beside the paper's figures; or compares the methods.

python -m pretrain.models
python -m pretrain.models --compare --resolution 256 512 1024
"""

from __future__ import annotations

import sys
from dataclasses import replace

from data_prep.common.command import command_parser
from data_prep.encoders import DOWNSAMPLE
from pretrain.models import PRESETS
from pretrain.models.compare import compare, compare_published
from pretrain.models.cost import CAPTION, count_flops, count_parameters, grid_of

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


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser("Prints parameters and FLOPs of every preset, or of the methods compared.")
    parser.add_argument(
        "--text-tokens", type=int, default=CAPTION, help=f"caption length for the FLOPs (default {CAPTION})"
    )
    parser.add_argument(
        "--compare", action="store_true", help="FocusDiT, FlexDiT and mediators at the 1B model's shape"
    )
    parser.add_argument("--resolution", type=int, nargs="+", default=[256, 512, 1024], help="with --compare: pixels")
    args = parser.parse_args(argv)
    about = f"one forward pass of one image with a caption of {args.text_tokens} tokens; a multiply-add is 2"
    if args.compare:
        print(compare(args.resolution, args.text_tokens))
        print(
            f"\nFLOPs: {about}; where they depend on the noise level, the mean over all levels."
            "\nn: the same share of the baseline with so many mediators at every level."
            "\nActivations: what a training step keeps of one image in bf16, at the noise level that needs the most.\n"
        )
        print(compare_published())
        print("G: 10⁹ multiply-adds; where the sources contradict themselves: docs/neighbours.md.")
        return 0
    print(table(args.text_tokens))
    print(f"\nFLOPs: {about}.")
    print(notes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
