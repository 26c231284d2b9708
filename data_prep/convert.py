"""Converts a data set to webdataset tars or Parquet files, which other libraries read: a way out of MDS shards.

    python data_prep/convert.py DATA --to webdataset --output OUT
    python data_prep/convert.py s3://bucket/NAME --to parquet --output OUT

Each MDS shard becomes one file, OUT/SOURCE/SET/PART-00000.tar or .parquet, with a row for each of its samples, in their order:
key, caption, width, height, and all tensors (text, latents, features) as one safetensors file in their own precision. The card
and the null text are copied. Every sample's checksum is compared as it is read. Started again, the command makes what is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from data_prep.common.command import command_parser, run_action
from data_prep.common.paths import path, path_or_url
from data_prep.common.words import counted


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = command_parser("Converts a data set to webdataset tars or Parquet files.")
    parser.add_argument(
        "data", metavar="DATA", type=path_or_url, help="the data set's folder, or its s3:// or gs:// URL"
    )
    parser.add_argument("--to", choices=("webdataset", "parquet"), required=True, help="the format")
    parser.add_argument("--output", type=path, required=True, help="folder to write to")
    args = parser.parse_args(argv)
    from data_prep.checks.damage import DamagedFile, Files  # late: the libraries take seconds
    from data_prep.conversion import convert

    def run() -> str:
        with TemporaryDirectory(prefix="convert-") as temporary:
            samples, files = convert(Files(args.data, Path(temporary)), args.output, args.to)
        return f"{counted(samples, 'sample')} in {counted(files, 'file')} of {args.output}"

    return run_action("convert", run, (DamagedFile, ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
