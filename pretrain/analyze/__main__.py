"""Analyses of a trained run, with what follows for its use.

python -m pretrain.analyze mediators     when to switch to more attention mediators while sampling
python -m pretrain.analyze utilization   how much of the FFN vocabulary tokens use (Fig. 2 and 7)
python -m pretrain.analyze masks         query masks over blocks and timesteps (Fig. 5)
python -m pretrain.analyze natural_mask  an FFN's natural mask beside the learned one (Fig. 6)
python -m pretrain.analyze skip          skipping FFNs by their query masks (Fig. 9)
python -m pretrain.analyze prune         removing the FFNs that the query masks weigh least (Fig. 10)
"""

from __future__ import annotations

import sys

from pretrain.console import run_one_of

ANALYSES = {
    "mediators": "pretrain.analyze.switching",
    "utilization": "pretrain.analyze.utilization",
    "masks": "pretrain.analyze.masks",
    "natural_mask": "pretrain.analyze.natural_mask",
    "skip": "pretrain.analyze.skip",
    "prune": "pretrain.analyze.prune",
}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_one_of("analyze", "Looks into a trained run.", ANALYSES, argv)


if __name__ == "__main__":
    sys.exit(main())
