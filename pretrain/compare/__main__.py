"""Comparison of runs: what differs between them, and their loss at equal images, FLOPs and hours.

    python -m pretrain.compare runs/baseline runs/focusdit --out comparison

prints a table of differences (config, DeepSpeed, code, data set) and of losses, and writes both to `compare.md` and the curves to
`compare.png`. It reads what a training keeps in its run directory: config.yaml, ds_config.json, environment.json, dataset.json
and the event files; no checkpoint, no data set.
"""

from __future__ import annotations

import sys

from data_prep.common.command import command_parser, run_action
from data_prep.common.paths import folder, path


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser("Says what differs between runs, and their loss at equal images, FLOPs and hours.")
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="run directories, two at least")
    parser.add_argument("--out", type=folder, help="folder for compare.md and compare.png")
    args = parser.parse_args(argv)
    from pretrain.compare.report import run  # late: torch and matplotlib take seconds

    return run_action("compare", lambda: run(args.runs, args.out))


if __name__ == "__main__":
    sys.exit(main())
