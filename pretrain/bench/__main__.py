"""Benchmarks: ratios of things timed side by side in one run.

python -m pretrain.bench step        a training step against diffusers' PixArt transformer
python -m pretrain.bench sample      sampling: FocusDiT against the plain DiT and against PixArt
python -m pretrain.bench picture     one picture to its pixels: seconds and memory, beside the paper's
python -m pretrain.bench skip        leaving FFNs out by their query masks
python -m pretrain.bench loader      reading: the training loader against bare reading and other layouts
python -m pretrain.bench start       the loader's start on a data set of many shards: seconds and memory of each process
python -m pretrain.bench checkpoint  what checkpoints, spike guard and watchdog cost
python -m pretrain.bench encode      data prep's pipeline against its bare encoders
python -m pretrain.bench roofline    a training step's FLOPs, bytes and time at a GPU's rates, computed
python -m pretrain.bench plan        the planner's simulation against measured steps of 1, 2 and 4 processes
python -m pretrain.bench gpu         first contact with a machine that has GPUs: what is true there, in nine minutes
python -m pretrain.bench shapes      how far the checker of the captioned shapes is right: damaged and wrong pictures
"""

from __future__ import annotations

import sys

from pretrain.console import run_one_of

BENCHMARKS = {
    "step": "pretrain.bench.step",
    "sample": "pretrain.bench.sample",
    "picture": "pretrain.bench.picture",
    "skip": "pretrain.bench.skip",
    "loader": "pretrain.bench.loader",
    "start": "pretrain.bench.start",
    "checkpoint": "pretrain.bench.checkpoint",
    "encode": "pretrain.bench.encode",
    "roofline": "pretrain.bench.roofline",
    "plan": "pretrain.bench.plan",
    "gpu": "pretrain.bench.gpu.command",
    "shapes": "pretrain.bench.shapes",
}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_one_of("bench", "Times things side by side.", BENCHMARKS, argv)


if __name__ == "__main__":
    sys.exit(main())
