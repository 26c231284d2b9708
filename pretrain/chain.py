"""Check that each stage can follow the one before it, before any is submitted:

    python -m pretrain.chain STAGE1 "OVERRIDES" STAGE2 "OVERRIDES" [STAGE3 "OVERRIDES" …] [--encodes DATA "RESOLUTIONS" "OPTIONS"]

Each stage is given as to its script: a config's name, and overrides with blanks between. `--encodes` names a data set that
is encoded before them, with further options of data_prep/encode.py, and need not exist yet. Prints a line for each problem;
exit code 2 if there is one.
"""

from __future__ import annotations

import sys

from data_prep.common.command import command_parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser("Checks that each stage can follow the one before it.")
    parser.add_argument(
        "stages",
        nargs="+",
        metavar="STAGE OVERRIDES",
        help="a config's name or the path of a YAML file, then section.key=value with blanks between, '' for none",
    )
    parser.add_argument(
        "--encodes", nargs=3, metavar=("DATA", "RESOLUTIONS", "OPTIONS"), help="a data set that is encoded before"
    )
    args = parser.parse_args(argv)
    stages = [(name, overrides.split()) for name, overrides in zip(args.stages[::2], args.stages[1::2], strict=False)]
    if len(args.stages) % 2 or len(stages) < 2:
        parser.error("two stages or more, each with its overrides after it: '' for none")
    if args.encodes and not all(side.isdecimal() for side in args.encodes[1].split()):
        parser.error(
            f"argument --encodes: RESOLUTIONS must be sides in pixels, such as '256 512', not {args.encodes[1]!r}"
        )
    from pretrain.handover import Encoding, problems  # late: the libraries take seconds

    encoding = None
    if args.encodes:
        data, sides, options = args.encodes
        encoding = Encoding(data, tuple(int(side) for side in sides.split()), tuple(options.split()))
    found = problems(stages, encoding)
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
