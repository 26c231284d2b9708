"""Pictures from a trained run or an exported model.

    python -m pretrain.sample --run runs/demo_512 --prompt "a large red circle on the left on a white background" --out samples
    torchrun --nproc-per-node=8 -m pretrain.sample --model exports/stage2_512 --prompts prompts.txt --out samples --batch-size 16

Writes one PNG per prompt (its number and a hash, never the prompt itself), each with its prompt, seed and settings inside;
then `prompts.jsonl`, a contact sheet `grid.png`, and `index.html`, which holds the pictures and opens without a server.

Each picture starts from its own seed: the batch and the number of processes change rounding only (docs/sampling.md says how
much). Started again, the command draws what is missing.
"""

from __future__ import annotations

import argparse
import sys

from data_prep.common.command import command_parser, run_action
from data_prep.common.paths import folder, path
from pretrain.console import add_local_rank, silence_libraries
from pretrain.sampling.options import add_drawing_arguments


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(argv)
    silence_libraries()
    from pretrain.sampling.drawing import run  # late: the libraries take seconds

    return run_action("sample", lambda: run(args))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = command_parser("Draws pictures with a trained run or an exported model.")
    add_local_rank(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=path, help="run directory")
    source.add_argument("--model", type=path, help="folder made by pretrain.export")
    parser.add_argument("--prompt", action="append", default=[], help="a caption; may be given several times")
    parser.add_argument("--prompts", type=path, help="file of captions, one a line")
    parser.add_argument("--out", type=folder, required=True, help="folder for the pictures")
    add_drawing_arguments(parser)
    args = parser.parse_args(argv)
    if not args.prompt and not args.prompts:
        parser.error("give --prompt or --prompts")
    return args


if __name__ == "__main__":
    sys.exit(main())
