"""Encodes captioned pictures in webdataset tars to MDS shards of text embeddings and latents.

    python data_prep/encode.py --input 'tars/*.tar' --output data/NAME --encoders flan-t5-xxl+mochi --resolutions 256 512
    python data_prep/encode.py --sources sources.yaml --output s3://bucket/NAME --work /shared/NAME --encoders …

Each tar becomes one part. Run it again after any stop: only missing parts are made, and the result has the same bytes as without
the stop. Start as many workers as there are GPUs, on any number of nodes and at any time: they share the tars through the
output folder. The worker that finds all parts done writes the card and the report.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from data_prep import schema
from data_prep.common.storage import Remote, is_remote
from data_prep.encoders import DOWNSAMPLE, default_device
from data_prep.inputs.sources import DEFAULT_SOURCE, Job, Source, make_source, read_sources
from data_prep.pictures.decoders import DecoderPool
from data_prep.pictures.hashes import MAX_DISTANCE
from data_prep.pictures.images import BUCKET_STEP
from data_prep.worker import claims, report
from data_prep.worker.commands import save_command
from data_prep.worker.deduplicate import DuplicateSearch, find_repeats
from data_prep.worker.encoder import Encoder, Settings
from data_prep.worker.monitor import EncodingMonitor
from data_prep.worker.parts import finish_data_set, read_part_report, remove_leftovers, whole_parts
from data_prep.worker.worker import Worker


def run(args: argparse.Namespace) -> int:
    """Encodes the missing parts; the worker that finds all of them done finishes the data set. Returns the exit code.

    Raises:
        ValueError: the output was made with other settings or from other tars, or two tars have the same name.
        OSError: tars or encoders are missing, or the output cannot be written.
    """
    sources = sources_from(args)
    jobs = [job for each in sources for job in each.jobs()]
    root = args.work or Path(args.output)
    remote = Remote(args.output) if is_remote(args.output) else None
    settings = Settings(
        resolutions=tuple(sorted(args.resolutions)),
        buckets=args.buckets,
        token_cap=args.token_cap,
        drop_long=args.long_captions == "drop",
        posterior=args.posterior,
        compression=args.compression,
        shard_bytes=args.shard_mb << 20,
    )
    encoder = Encoder(args.encoders, settings, args.device, args.compile)
    card = open_data_set(root, encoder, args, sources, remote)
    save_command(root, options_from(args), args.output)
    check_parts(jobs, root)
    whole = set(whole_parts(root))
    encoded = [j for j in jobs if j.name in whole]
    print(f"{len(jobs)} tars, {len(encoded)} of them already encoded", flush=True)
    monitor = EncodingMonitor(
        sum(j.bytes for j in jobs), sum(j.bytes for j in encoded), root / schema.WORK / "tensorboard" / worker_name()
    )
    with (
        claims.Claims(root / schema.WORK / "claims", args.claim_timeout) as own_claims,
        DecoderPool(args.decoders, args.image_seconds, args.image_memory_mb << 20) as pool,
    ):
        worker = Worker(root, card, encoder, jobs, own_claims, pool, monitor, remote)
        try:
            if args.duplicates != "keep":
                search = DuplicateSearch(args.duplicates, args.duplicate_distance, settings.resolutions, args.buckets)
                worker.repeats = find_repeats(root, jobs, search, own_claims, pool, monitor.say)
            worker.run()
        finally:
            monitor.close()
    return finish(root, card, jobs, worker.failed, remote)


def finish(root: Path, card: schema.Card, jobs: list[Job], failed: dict[str, OSError], remote: Remote | None) -> int:
    """Writes report, indexes and card once all parts are there. Returns the exit code."""
    encoded = set(whole_parts(root))
    if failed:
        names = "\n".join(f"  {error}" for error in failed.values())
        print(f"encode: {len(failed)} tars could not be read; run this again:\n{names}", file=sys.stderr)
        return 1
    if missing := [j.name for j in jobs if j.name not in encoded]:
        print(f"nothing is left for this worker; others are at work on {len(missing)} parts")
        return 0
    remove_leftovers(root, encoded)
    claims.remove_claims(root / schema.WORK / "claims", encoded)
    counts = report.write_reports(root, card, remote)
    finish_data_set(root, card, report.card_counts(counts), remote)
    print(f"{root}: {(root / report.TEXT).read_text(encoding='utf-8')}", end="")
    if not counts["written"]:
        print("encode: not one sample was written; the reasons stand above", file=sys.stderr)
        return 1
    return 0


def sources_from(args: argparse.Namespace) -> list[Source]:
    """Returns the sources that the options name."""
    if args.sources:
        return read_sources(args.sources)
    return [make_source(DEFAULT_SOURCE, [args.input], args.captions, args.filter)]


def jobs_from(argv: list[str]) -> list[Job]:
    """Lists the tars that a command line names, each with the part that it becomes."""
    return [job for source in sources_from(parse(argv)) for job in source.jobs()]


def open_data_set(
    root: Path, encoder: Encoder, args: argparse.Namespace, sources: list[Source], remote: Remote | None
) -> schema.Card:
    """Starts the data set, or continues one that is there. Raises ValueError where that one has other settings."""
    card = encoder.card(args.text_dtype)
    choices = {
        "long_captions": args.long_captions,
        "duplicates": None if args.duplicates == "keep" else [args.duplicates, args.duplicate_distance],
        "compression": args.compression,
        "shard_mb": args.shard_mb,
    }
    card.choices = {**choices, "sources": {s.name: s.choices for s in sorted(sources, key=lambda s: s.name)}}
    if (root / schema.CARD).exists():
        old = schema.Card.load(root)
        old_sources = old.choices.pop("sources")
        before = {**old.settings(), **old.choices, **{f"source {k}": v for k, v in old_sources.items()}}
        now = {**card.settings(), **choices, **{f"source {s.name}": s.choices for s in sources}}
        if different := [k for k, v in now.items() if k in before and before[k] != v]:
            lines = [f"  {k}: there {before[k]}, now {now[k]}" for k in different]
            raise ValueError(f"{root} was made with other settings; choose another --output:\n" + "\n".join(lines))
        card.choices["sources"] = dict(sorted({**old_sources, **card.choices["sources"]}.items()))
    else:
        root.mkdir(parents=True, exist_ok=True)
        card.save(root)
    if not (root / schema.NULL_TEXT).exists():
        schema.save_null_text(root, encoder.text.encode([""], args.token_cap)[0][0])
        if remote is not None:
            remote.upload(root / schema.NULL_TEXT, schema.NULL_TEXT)
    return card


def options_from(args: argparse.Namespace) -> list[str]:
    """Returns the options that the parts depend on, as words of a command line: not the output and not the machine's."""
    arguments: list[str] = []
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name in ("output", "work", "device", "decoders", "claim_timeout") or value is None or value is False:
            continue
        values = [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]
        arguments += [option] if value is True else values
    return arguments


def check_parts(jobs: list[Job], root: Path) -> None:
    """Raises ValueError where a part was made from another tar of the same name."""
    for job in jobs:
        old = read_part_report(root, job.name)
        if old is not None and old["tar_bytes"] != job.bytes:
            raise ValueError(
                f"the part {job.name} was made of {old['tar']} with {old['tar_bytes']} bytes, but {job.url} has "
                f"{job.bytes}; to make it again, remove {root / schema.REPORTS / job.name}.json"
            )


def worker_name() -> str:
    """Returns a name for this worker's TensorBoard run."""
    return re.sub(r"[^\w.-]", "_", f"{socket.gethostname()}-{os.environ.get('SLURM_JOB_ID', '')}-{os.getpid()}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; a wrong one ends the program with one line."""
    parser = argparse.ArgumentParser(description="Encodes webdataset tars into MDS shards.")
    add = parser.add_argument
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--input", help="folder of tars, a quoted pattern of them, or an s3://, gs://, http(s):// URL")
    inputs.add_argument(
        "--sources", type=Path, help="YAML file of several named sources (data_prep/inputs/sources.py shows one)"
    )
    add("--output", required=True, help="the data set's folder, or an s3:// or gs:// URL")
    add("--work", type=Path, help="with an output on object storage: a folder that all workers share")
    add("--encoders", required=True, help="tiny, or TEXT+VAE: names, hub names or folders")
    add("--resolutions", type=int, nargs="+", default=[256, 512], help="in pixels (default 256 512)")
    add("--buckets", action="store_true", help="aspect-ratio buckets of each resolution's area, instead of squares")
    add("--captions", help="field of key.json, .txt for key.txt, or several with weights: recaption=0.8,.txt=0.2")
    add("--filter", default="", help='condition on fields of key.json: "aesthetic >= 5.5 and watermark < 0.5"')
    add("--token-cap", type=int, default=300, help="tokens of a caption (default 300)")
    add(
        "--long-captions",
        choices=("cut", "drop"),
        default="cut",
        help="or drop the samples of longer ones (default cut)",
    )
    add("--duplicates", choices=("keep", "exact", "perceptual"), default="keep", help="which pictures to store once")
    add("--duplicate-distance", type=int, default=3, help="perceptual: bits of 64 that may differ (default 3)")
    add(
        "--posterior",
        choices=("mean_std", "mean"),
        default="mean_std",
        help="stored figures of a latent (default mean_std)",
    )
    add("--text-dtype", choices=schema.TEXT_DTYPES, default="bfloat16", help="8 bits halve the text, with some error")
    add("--compression", help="of the shards: zstd, or zstd:LEVEL (default none)")
    add("--shard-mb", type=int, default=schema.SHARD_BYTES >> 20, help="largest size of a shard in MiB (default 128)")
    add("--decoders", type=int, default=default_decoders(), help="processes that decode pictures (default: one a core)")
    add(
        "--image-seconds",
        type=float,
        default=30.0,
        help="of computing that a picture may take, else it is dropped (default 30)",
    )
    add("--image-memory-mb", type=int, default=4096, help="of a decoding process, in MiB (default 4096)")
    add("--claim-timeout", type=float, default=60.0, help="seconds after which a silent worker counts as dead")
    add("--compile", action="store_true", help="torch.compile the encoders; pays on GPUs")
    add("--device", default=default_device())
    args = parser.parse_args(argv)
    if problem := option_problem(args):
        parser.error(problem)
    return args


def option_problem(args: argparse.Namespace) -> str | None:
    """Returns what is wrong with the options, in one line; None where nothing is."""
    unit = BUCKET_STEP if args.buckets else DOWNSAMPLE
    if bad := [r for r in args.resolutions if r <= 0 or r % unit]:
        return f"--resolutions {bad[0]}: sizes must be above 0 and divisible by {unit}"
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
    if not 0 <= args.duplicate_distance <= MAX_DISTANCE:
        return f"--duplicate-distance {args.duplicate_distance} must be from 0 to {MAX_DISTANCE}"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        return f"--device {args.device}: torch finds no GPU here; use --device cpu"
    return None


def default_decoders() -> int:
    """Returns the number of cores that this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)))


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"encode: {error_line(error, args)}", file=sys.stderr)
        return 1


def error_line(error: Exception, args: Any) -> str:
    """Returns an error as one line, with the mend where the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space is left in {args.work or args.output} ({error}); every part that was finished is whole, and "
            "nothing else was kept: make room and run the same command again"
        )
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
