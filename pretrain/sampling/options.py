"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of an export to a command."""
    parser.add_argument("--weights", choices=("ema", "master"), default="ema")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the transformer's file")
    parser.add_argument(
        "--encoders", choices=("copy", "reference"), default="copy",
        help="copy the text encoder and the VAE into the folder, or only name them",
    )  # fmt: skip


def require_at_least(least: Mapping[str, tuple[int | None, int]]) -> None:
    """Raises ValueError for an option whose number, the first of its two, is below the second."""
    for name, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise ValueError(f"{name} {value}: must be at least {lowest}")
