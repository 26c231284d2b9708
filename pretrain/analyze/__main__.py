"""What a trained run does, and what that says about how to use it.

python -m pretrain.analyze mediators   when to switch to more attention mediators while sampling
"""

from __future__ import annotations

import argparse
import sys

from pretrain.analyze import mediators
from pretrain.console import quiet

ANALYSES = {"mediators": mediators}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Looks into a trained run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in ANALYSES.items():
        about = " ".join((module.__doc__ or "").split("\n\n")[0].split())
        module.arguments(commands.add_parser(name, help=about, description=about))
    args = parser.parse_args(argv)
    quiet()
    try:
        print(ANALYSES[args.command].run(args))
    except (ValueError, OSError) as error:
        print(f"analyze: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
