"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of a run's weights to a command."""
    parser.add_argument(
        "--weights", default="ema", help="of the run: ema, master, or another average, such as ema_0.999 (default: ema)"
    )


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of an export to a command."""
    add_weights_argument(parser)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the transformer's file")
    parser.add_argument(
        "--encoders", choices=("copy", "reference"), default="copy",
        help="copy the text encoder and the VAE into the folder, or only name them",
    )  # fmt: skip


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what a picture depends on beside the model and its prompt, and how pictures are drawn."""
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
    add_weights_argument(parser)
    parser.add_argument("--step", type=int, help="of --run: the checkpoint of this training step (default: the newest)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures drawn together")
    parser.add_argument(
        "--compile", choices=("blocks", "graphs"), help="torch.compile: each block, or all as CUDA graphs"
    )
    parser.add_argument("--device", help="default: this process's own GPU, or the CPU")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that were drawn with other settings")


def require_at_least(least: Mapping[str, tuple[int | None, int]]) -> None:
    """Raises ValueError for an option whose number, the first of its two, is below the second."""
    for name, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise ValueError(f"{name} {value}: must be at least {lowest}")
