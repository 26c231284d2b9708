"""Check that one stage can follow another, before either is submitted:

    python -m pretrain.chain STAGE1 "OVERRIDES" STAGE2 "OVERRIDES" [--encodes DATA "RESOLUTIONS"]

Each stage is given as to its script: a config's name, and overrides with blanks between. `--encodes` names a data set that
is encoded before them and need not exist yet. Prints a line for each problem; exit code 2 if there is one.
"""

from __future__ import annotations

import sys

from data_prep.common.command import command_parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser("Checks that one stage can follow another.")
    for stage in ("stage1", "stage2"):
        parser.add_argument(stage, help="a config's name, or the path of a YAML file")
        parser.add_argument(f"{stage}_overrides", help="section.key=value, blanks between")
    parser.add_argument("--encodes", nargs=2, metavar=("DATA", "RESOLUTIONS"), help="a data set that is encoded before")
    args = parser.parse_args(argv)
    if args.encodes and not all(side.isdecimal() for side in args.encodes[1].split()):
        parser.error(
            f"argument --encodes: RESOLUTIONS must be sides in pixels, such as '256 512', not {args.encodes[1]!r}"
        )
    from pretrain.handover import Encoding, problems  # late: the libraries take seconds

    encoding = None
    if args.encodes:
        encoding = Encoding(args.encodes[0], tuple(int(side) for side in args.encodes[1].split()))
    stages = [(args.stage1, args.stage1_overrides.split()), (args.stage2, args.stage2_overrides.split())]
    found = problems(stages, encoding)
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
