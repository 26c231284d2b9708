"""Removal of the FFNs that the query masks weigh least (FocusDiT, §6, Fig. 10).

    python -m pretrain.prune --run runs/stage2_512 --prompts prompts.txt --remove 8 --out exports/pruned

draws the prompts (the paper: 200), averages each block's mask over prompts, steps and tokens, removes the FFNs of the lowest
blocks, and writes the smaller model as an export, with `prune.json`, `prune.png` (the means) and `before_after.png`. The
query masks of those blocks stay, since the next blocks read them.
"""

from __future__ import annotations

import sys

from data_prep.common.command import command_parser, run_action
from data_prep.common.paths import path
from pretrain.console import silence_libraries
from pretrain.sampling.options import add_export_arguments


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser("Removes the FFNs that the query masks weigh least.")
    parser.add_argument("--run", type=path, required=True, help="run directory")
    parser.add_argument("--prompts", type=path, required=True, help="file of captions, one a line; the paper took 200")
    parser.add_argument("--remove", type=int, required=True, metavar="K", help="FFNs to remove")
    parser.add_argument("--out", type=path, required=True, help="folder to write; must not be there yet")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the run's preview.steps, 30 unless set)")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts drawn together")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; each next prompt has the next seed")
    parser.add_argument("--device", help="default: the GPU, or the CPU")
    add_export_arguments(parser)
    args = parser.parse_args(argv)
    silence_libraries()
    from pretrain.sampling.pruning import run  # late: the libraries take seconds

    return run_action("prune", lambda: f"{run(args)}\nsee {args.out / 'prune.png'} and {args.out / 'before_after.png'}")


if __name__ == "__main__":
    sys.exit(main())
