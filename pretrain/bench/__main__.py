"""Benchmarks: ratios of things timed side by side in one run.

python -m pretrain.bench step        a training step against diffusers' PixArt transformer
python -m pretrain.bench sample      sampling: FocusDiT against the plain DiT and against PixArt
python -m pretrain.bench picture     one picture to its pixels: seconds and memory, beside the paper's
python -m pretrain.bench skip        leaving FFNs out by their query masks
python -m pretrain.bench loader      reading: the training loader against bare reading and other layouts
python -m pretrain.bench checkpoint  what checkpoints, spike guard and watchdog cost
python -m pretrain.bench neighbours  FocusDiT, FlexDiT and mediators trained on the shapes, at equal images and FLOPs
python -m pretrain.bench encode      data prep's pipeline against its bare encoders
"""

from __future__ import annotations

import sys

from pretrain.bench import checkpoint, encode, loader, neighbours, picture, sample, skip, step
from pretrain.console import run_one_of

BENCHMARKS = {
    "step": step,
    "sample": sample,
    "picture": picture,
    "skip": skip,
    "loader": loader,
    "checkpoint": checkpoint,
    "neighbours": neighbours,
    "encode": encode,
}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_one_of("bench", "Times things side by side.", BENCHMARKS, argv)


if __name__ == "__main__":
    sys.exit(main())
