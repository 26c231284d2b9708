"""Checks a data set to the last sample; makes damaged parts again; draws some of its pictures.

    python data_prep/verify.py DATA                   checks all of it: exit code 0 whole, 1 damaged, 2 could not be checked
    python data_prep/verify.py DATA --repair          also makes damaged parts again, by the commands in its work/encode/
    python data_prep/verify.py DATA --sample 16       only decodes 16 latents into a picture, with their captions
    python data_prep/verify.py s3://bucket/NAME --work /shared/NAME --repair -- --device cuda:1

DATA is the folder or the URL that was encode.py's --output. Tars that were never encoded are not noticed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from data_prep import encode
from data_prep.common.command import command_parser
from data_prep.common.paths import path, path_or_url
from data_prep.common.storage import is_remote


def run(args: argparse.Namespace, more: list[str], temporary: Path) -> int:
    """Runs the check, the repair or the sample; returns the exit code."""
    from data_prep.checks.damage import Files  # late: the libraries take seconds
    from data_prep.checks.repair import EncodeCommand, repair
    from data_prep.checks.whole import check, sample, table
    from data_prep.worker.commands import SavedCommand

    files = Files(args.data, temporary)
    if args.sample:
        picture, keys = sample(files, args.sample, args.seed, args.device)
        picture.save(args.out)
        print("\n".join([*keys, f"{args.out}: {len(keys)} latents, decoded, in this order"]))
        return 0
    work = args.work or Path(args.data)
    if files.remote is None and (
        remote := next((c.output for c in SavedCommand.load_all(work) if is_remote(c.output)), None)
    ):
        raise ValueError(f"the shards of {work} lie at {remote}: run verify.py {remote} --work {work}")
    result = check(files, args.workers)
    print(table(result), flush=True)
    for _ in range(2 if args.repair else 0):  # twice: samples are checked only once the card is repaired
        if not result.damages:
            break
        repair(files, work, result.damages, more, EncodeCommand(encode.main, encode.jobs_from))
        known = {name: part for name, part in result.parts.items() if result.card and not part.damages}
        result = check(files, args.workers, known)
        print(table(result), flush=True)
    return 1 if result.damages else 0


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line; also returns the options for encode.py, behind `--`."""
    argv = sys.argv[1:] if argv is None else argv
    own, more = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = command_parser("Checks a data set, repairs it, or shows pictures of it.")
    add = parser.add_argument
    add("data", type=path_or_url, metavar="DATA", help="the data set's folder, or its s3:// or gs:// URL")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads (default: one a core)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--repair", action="store_true", help="make damaged parts again; options for encode.py after --"
    )
    action.add_argument("--sample", type=int, metavar="N", help="decode N latents into a picture, and check nothing")
    add("--work", type=path, help="with --repair of a URL: the folder that was encode.py's --work")
    add("--out", type=path, default=Path("samples.png"), help="the picture of --sample (default: samples.png)")
    add("--seed", type=int, default=0, help="seed of --sample's choice")
    add("--device", help="device that --sample decodes on (default: this task's GPU, or the CPU)")
    args = parser.parse_args(own)
    if args.workers < 1 or (args.sample is not None and args.sample < 1):
        parser.error("--workers and --sample must be above 0")
    if args.repair and is_remote(args.data) != (args.work is not None):
        parser.error("--repair of a URL needs --work, the folder that its workers shared; that of a folder action not")
    return args, more


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args, more = parse(argv)
    from data_prep.checks.damage import DamagedFile

    try:
        with TemporaryDirectory(prefix="verify-") as temporary:
            return run(args, more, Path(temporary))
    except (DamagedFile, ValueError, OSError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
