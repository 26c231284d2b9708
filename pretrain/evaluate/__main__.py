"""Whether a run is good: pictures are drawn and judged by metrics, each repeatable by itself.

    python -m pretrain.evaluate --run runs/stage2_512 --prompts prompts.txt --metrics shapes --out evaluations/stage2
    torchrun --nproc-per-node=8 -m pretrain.evaluate --model exports/stage2_512 --prompts geneval.jsonl --per-prompt 4 \\
        --metrics geneval clipscore --out evaluations/geneval
    python -m pretrain.evaluate --run runs/stage2_512 --every 5000 --prompts prompts.txt --metrics shapes --out evaluations/curve
    python -m pretrain.evaluate --pictures samples --prompts prompts.txt --metrics fid --fid-reference coco.npz --out fid
    python -m pretrain.evaluate pairwise SAMPLES_A SAMPLES_B          a page on which people judge

Stopped, the same command goes on: no picture is drawn or judged twice. `--every` follows a training, and evaluates each kept
checkpoint once. docs/evaluation.md has the metrics and their files.
"""

from __future__ import annotations

import argparse
import sys

from data_prep.common.command import command_parser, run_action
from data_prep.common.paths import folder, path
from pretrain.console import add_local_rank, run_one_of, silence_libraries
from pretrain.evaluate import judge
from pretrain.evaluate.metrics import METRICS
from pretrain.sampling.options import add_drawing_arguments


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["pairwise"]:
        return run_one_of("evaluate", "Judging by people.", {"pairwise": "pretrain.evaluate.pairwise"}, words)
    args = parse(words)
    silence_libraries()
    from pretrain.evaluate.evaluation import run  # late: the libraries take seconds
    from pretrain.evaluate.follow import follow

    return run_action("evaluate", lambda: run(args) if args.every is None else follow(args))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = command_parser("Draws pictures with a trained run or an exported model, and judges them by metrics.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=path, help="run directory")
    source.add_argument("--model", type=path, help="folder made by pretrain.export")
    source.add_argument("--pictures", type=path, help="folder of pictures that are there already")
    parser.add_argument("--prompts", type=path, help="file of prompts: one a line, or .jsonl with an object a line")
    parser.add_argument("--per-prompt", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, required=True)
    parser.add_argument("--out", type=folder, required=True, help="folder for pictures, records and results")
    parser.add_argument(
        "--every", type=int, metavar="STEPS",
        help="follow the training of --run: evaluate its checkpoints of these steps' multiples as they come",
    )  # fmt: skip
    parser.add_argument("--poll", type=float, default=30.0, metavar="SECONDS", help="of --every: between two looks")
    add_drawing_arguments(parser)
    add_local_rank(parser)
    for name in METRICS:
        module = METRICS[name]()
        module.arguments(parser.add_argument_group((module.__doc__ or name).partition("\n\n")[0]))
    judge.arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
