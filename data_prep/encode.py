"""Encodes captioned pictures in tars, Parquet files or folders to MDS shards of text embeddings and latents.

    python data_prep/encode.py --input 'tars/*.tar' --output data/NAME --encoders flan-t5-xxl+mochi --resolutions 256 512
    python data_prep/encode.py --sources sources.yaml --output s3://bucket/NAME --work /shared/NAME --encoders …

Each file becomes one part. Run it again after any stop: only missing parts are made, and the result has the same bytes as without
the stop. Start as many workers as there are GPUs, on any number of nodes and at any time: they share the tars through the
output folder. The worker that finds all parts done writes the card and the report.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import TYPE_CHECKING

from data_prep.common.command import command_parser
from data_prep.common.paths import path, path_or_url

if TYPE_CHECKING:
    from data_prep.inputs.sources import Job


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse(argv)
    from data_prep.worker.encoding import error_line, run  # late: the libraries take seconds

    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"encode: {error_line(error, args)}", file=sys.stderr)
        return 1


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; a wrong one ends the program with one line."""
    parser = command_parser("Encodes captioned pictures in tars, Parquet files or folders to MDS shards.")
    _add_data_options(parser)
    _add_run_options(parser)
    args = parser.parse_args(argv)
    if problem := option_problem(args):
        parser.error(problem)
    return args


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds what is read, and what is stored of it."""
    add = parser.add_argument
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--input",
        type=path_or_url,
        nargs="+",
        action="extend",
        help="tars, Parquet files, folders of either or of pictures, patterns of them, or s3://, gs://, http(s):// URLs",
    )
    inputs.add_argument(
        "--sources", type=path, help="YAML file of several named sources (data_prep/inputs/sources.py shows one)"
    )
    add("--output", type=path_or_url, required=True, help="the data set's folder, or an s3:// or gs:// URL")
    add("--work", type=path, help="with an output on object storage: a folder that all workers share")
    add("--encoders", type=encoders, required=True, help="tiny, or TEXT+VAE: names, hub names or folders")
    add("--features", type=path_or_url, help="vision encoder whose features training may use: tiny, a name or a folder")
    add("--features-dtype", choices=("float16", "int8", "float8_e4m3fn"), help="8 bits halve them (default: float16)")
    add("--resolutions", type=int, nargs="+", default=[256, 512], help="in pixels (default: 256 512)")
    add("--buckets", action="store_true", help="aspect-ratio buckets of each resolution's area, instead of squares")
    add("--captions", help="field of key.json, .txt for key.txt, or several with weights: recaption=0.8,.txt=0.2")
    add("--filter", default="", help='condition on fields of key.json: "aesthetic >= 5.5 and watermark < 0.5"')
    add("--token-cap", type=int, default=300, help="tokens of a caption (default: 300)")
    add(
        "--long-captions",
        choices=("cut", "drop"),
        default="cut",
        help="or drop the samples of longer ones (default: cut)",
    )
    add("--max-unknown", type=float, help="drop captions of which a larger share of the tokens is unknown, 0 to 1")
    add("--duplicates", choices=("keep", "exact", "perceptual"), default="keep", help="which pictures to store once")
    add("--duplicate-distance", type=int, default=3, help="perceptual: bits of 64 that may differ (default: 3)")
    add(
        "--posterior",
        choices=("mean_std", "mean"),
        default="mean_std",
        help="stored figures of a latent (default: mean_std)",
    )
    add(
        "--text-dtype",
        choices=("bfloat16", "int8", "float8_e4m3fn"),
        default="bfloat16",
        help="8 bits halve the text, with some error",
    )
    add("--compression", help="of the shards: zstd, or zstd:LEVEL (default: none)")
    add("--shard-mb", type=int, default=128, help="largest size of a shard in MiB (default: 128)")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds how it is done."""
    add = parser.add_argument
    add("--decoders", type=int, default=default_decoders(), help="processes that decode pictures (default: one a core)")
    add(
        "--image-seconds",
        type=float,
        default=30.0,
        help="of computing that a picture may take, else it is dropped (default: 30)",
    )
    add("--image-memory-mb", type=int, default=4096, help="of a decoding process, in MiB (default 4096)")
    add(
        "--changed",
        choices=("stop", "remake", "keep"),
        default="stop",
        help="what to do about inputs that were replaced since they were encoded (default: name them and stop)",
    )
    add("--claim-timeout", type=float, default=60.0, help="seconds after which a silent worker counts as dead")
    add("--compile", action="store_true", help="torch.compile the encoders; pays on GPUs")
    add("--device", help="default: this task's GPU, or the CPU")


def encoders(text: str) -> str:
    """The type of --encoders: names, or folders whose paths are expanded."""
    return "+".join(path_or_url(part) for part in text.split("+"))


def option_problem(args: argparse.Namespace) -> str | None:
    """Returns what is wrong with the options, in one line; None where nothing is."""
    from data_prep.common.storage import is_remote
    from data_prep.encoders import DOWNSAMPLE, FEATURE_CELL
    from data_prep.pictures.hashes import MAX_DISTANCE
    from data_prep.pictures.images import BUCKET_STEP

    unit = BUCKET_STEP if args.buckets else DOWNSAMPLE
    if bad := [r for r in args.resolutions if r <= 0 or r % unit]:
        return f"--resolutions {bad[0]}: sizes must be above 0 and divisible by {unit}"
    if args.features and (bad := [r for r in args.resolutions if r % FEATURE_CELL]):
        return (
            f"--resolutions {bad[0]}: with --features sizes must be divisible by {FEATURE_CELL}, the pixels of a vector"
        )
    if args.features_dtype and not args.features:
        return "--features-dtype is of the features, and there are none: give --features, too"
    for name in ("token_cap", "shard_mb", "decoders", "image_seconds", "image_memory_mb", "claim_timeout"):
        if getattr(args, name) <= 0:
            return f"--{name.replace('_', '-')} must be above 0"
    if args.shard_mb >= 4096:
        return "--shard-mb must be below 4096, which is MDS's limit"
    if args.sources and (args.captions or args.filter):
        return "--captions and --filter go with --input; in a file of sources each source has its own"
    try:
        remote = is_remote(args.output)
    except ValueError as error:
        return f"--output {error}"
    if remote != (args.work is not None):
        return "--work is for an --output on object storage: a folder that all workers share, for what is under way"
    if args.compression and not re.fullmatch(r"zstd(:([1-9]|1\d|2[0-2]))?", args.compression):
        return f"--compression {args.compression}: expected zstd or zstd:LEVEL, LEVEL from 1 to 22"
    if args.max_unknown is not None and not 0 <= args.max_unknown <= 1:
        return f"--max-unknown {args.max_unknown} must be from 0 to 1"
    if not 0 <= args.duplicate_distance <= MAX_DISTANCE:
        return f"--duplicate-distance {args.duplicate_distance} must be from 0 to {MAX_DISTANCE}"
    return None


def default_decoders() -> int:
    """Returns the number of cores that this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)))


def jobs_from(argv: list[str]) -> list[Job]:
    """Lists the tars that a command line names, each with the part that it becomes."""
    from data_prep.worker.encoding import sources_from

    return [job for source in sources_from(parse(argv)) for job in source.jobs()]


if __name__ == "__main__":
    sys.exit(main())
