"""Ablations: rows that differ from one baseline by a few settings, trained with several seeds and judged, in one table.

    python -m pretrain.ablate table3 --scale tiny --jobs 2
    python -m pretrain.ablate table3 --scale small --cell 3          one training alone, as slurm/ablate.sh does
    python -m pretrain.ablate neighbours --jobs 2                    FlexDiT and mediators, at equal images and FLOPs
    python -m pretrain.ablate less --jobs 2                          Muon, TREAD, …, at equal images, FLOPs and seconds
    python -m pretrain.ablate table3 --scale paper --list            the commands of each cell, to be submitted

Stopped, the same command goes on. docs/ablation.md has what came out.
"""

from __future__ import annotations

import argparse
import sys

from data_prep.common.command import command_parser, run_action
from data_prep.common.paths import folder, path
from pretrain.ablate.less import STUDY as LESS
from pretrain.ablate.neighbours import STUDY as NEIGHBOURS
from pretrain.ablate.table3 import STUDY as TABLE3
from pretrain.console import silence_libraries

STUDIES = {"table3": TABLE3, "neighbours": NEIGHBOURS, "less": LESS}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(argv)
    silence_libraries()
    from pretrain.ablate.running import run  # late: the libraries take seconds

    return run_action("ablate", lambda: run(STUDIES[args.study], args), (ValueError, OSError, RuntimeError))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = command_parser("Trains and judges a study's rows, and writes its table.")
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument(
        "--scale", choices=sorted({s for study in STUDIES.values() for s in study.scales}), default="tiny"
    )
    parser.add_argument("--out", type=folder, help="folder for runs, results and table (default: runs/STUDY_SCALE)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the scale's")
    parser.add_argument("--jobs", type=int, default=1, help="cells at the same time")
    parser.add_argument("--processes", type=int, default=1, help="processes of a cell's training, one a GPU")
    parser.add_argument("--cell", type=int, help="do the cells of one training alone, by its number in --list")
    parser.add_argument("--list", action="store_true", help="print the cells with their commands, and do nothing")
    parser.add_argument("--prompts", type=path, help="file of prompts (default: the scale's captioned shapes)")
    parser.add_argument("--metrics", nargs="+", default=["shapes"], help="of pretrain.evaluate")
    parser.add_argument(
        "--evaluate", default="", metavar="OPTIONS", help="further options of pretrain.evaluate, in quotes"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of every training")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
