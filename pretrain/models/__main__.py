"""Prints the table of presets: parameters by part and FLOPs per image, beside the paper's figures; or compares the methods.

python -m pretrain.models
python -m pretrain.models --compare --resolution 256 512 1024
"""

from __future__ import annotations

import argparse
import sys

from data_prep.common.command import command_parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(argv)
    from pretrain.models.compare import compare, compare_published  # late: the libraries take seconds
    from pretrain.models.table import notes, table

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


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = command_parser("Prints parameters and FLOPs of every preset, or of the methods compared.")
    parser.add_argument("--text-tokens", type=int, default=120, help="caption length for the FLOPs")
    parser.add_argument(
        "--compare", action="store_true", help="FocusDiT, FlexDiT and mediators at the 1B model's shape"
    )
    parser.add_argument(
        "--resolution",
        type=int,
        nargs="+",
        default=[256, 512, 1024],
        help="with --compare: pixels (default: 256 512 1024)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
