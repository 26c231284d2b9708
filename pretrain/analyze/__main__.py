"""Analyses of a trained run, with what follows for its use.

python -m pretrain.analyze mediators   when to switch to more attention mediators while sampling
"""

from __future__ import annotations

import sys

from pretrain.console import run_one_of

ANALYSES = {"mediators": "pretrain.analyze.switching"}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_one_of("analyze", "Looks into a trained run.", ANALYSES, argv)


if __name__ == "__main__":
    sys.exit(main())
