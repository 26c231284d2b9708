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
from data_prep.common.paths import path
from pretrain.console import silence_libraries


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(argv)
    silence_libraries()
    from pretrain.sampling.drawing import run  # late: the libraries take seconds

    return run_action("sample", lambda: run(args))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = command_parser("Draws pictures with a trained run or an exported model.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=path, help="run directory")
    source.add_argument("--model", type=path, help="folder made by pretrain.export")
    parser.add_argument("--prompt", action="append", default=[], help="a caption; may be given several times")
    parser.add_argument("--prompts", type=path, help="file of captions, one a line")
    parser.add_argument("--out", type=path, required=True, help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; each next prompt has the next seed")
    parser.add_argument("--height", type=int, help="in pixels (default: the training's resolution)")
    parser.add_argument("--width", type=int, help="in pixels (default: the training's resolution)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the run's preview.steps, 30 unless set)")
    parser.add_argument(
        "--guidance",
        type=float,
        help="guidance scale (default: the run's preview.guidance, 5.5 unless set)",
    )
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="times in 0 (data) .. 1 (noise) where guidance acts (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--negative-prompt", help="for all pictures (default: the empty caption; by --recipe release its own)"
    )
    parser.add_argument(
        "--recipe", choices=("plain", "release"),
        help="plain, or every way of the authors' inference code (default: the model's; imported weights have release)",
    )  # fmt: skip
    parser.add_argument(
        "--sampler",
        choices=("ode", "sde"),
        help="flow: ode, or sde with noise in each step (default: the model's: ode)",
    )
    parser.add_argument(
        "--shift",
        type=float,
        help="shift of the times (default: the run's preview.shift, 3 unless set)",
    )
    parser.add_argument(
        "--skip-threshold", type=float, help="leave out FFN work where the query mask is under it (0..1)"
    )
    parser.add_argument("--skip-unit", choices=("token", "layer"), default="token", help="what the threshold judges")
    parser.add_argument(
        "--mediators", type=int, metavar="N", help="at all steps (default: few near noise, many near data)"
    )
    parser.add_argument(
        "--mediator-rho", type=float, nargs="+", metavar="RHO",
        help="more mediators for each picture as it settles; one fewer than the model has numbers of them",
    )  # fmt: skip
    parser.add_argument("--save-masks", action="store_true", help="maps of the query masks over blocks and steps")
    parser.add_argument("--weights", choices=("ema", "master"), default="ema", help="of --run")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures drawn together")
    parser.add_argument(
        "--compile", choices=("blocks", "graphs"), help="torch.compile: each block, or all as CUDA graphs"
    )
    parser.add_argument("--device", help="default: this process's own GPU, or the CPU")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that were drawn with other settings")
    args = parser.parse_args(argv)
    if not args.prompt and not args.prompts:
        parser.error("give --prompt or --prompts")
    return args


if __name__ == "__main__":
    sys.exit(main())
