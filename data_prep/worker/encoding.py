"""Encoding of a data set by one worker of any number: opens the data set, encodes the missing parts, finishes it.

`data_prep/encode.py` is its command.
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
from data_prep.common.memory import keep_freed_memory
from data_prep.common.storage import Remote, is_remote
from data_prep.common.words import counted
from data_prep.encoders import default_device
from data_prep.inputs.finder import counted_inputs
from data_prep.inputs.sources import DEFAULT_SOURCE, Job, Source, make_source, read_sources
from data_prep.inputs.survey import survey_sources
from data_prep.pictures.decoders import DecoderPool
from data_prep.worker import claims, report
from data_prep.worker.changes import changed_parts, is_empty, remove_changed, start_anew
from data_prep.worker.commands import save_command
from data_prep.worker.deduplicate import DuplicateSearch, find_repeats
from data_prep.worker.encoder import Encoder, Settings
from data_prep.worker.monitor import EncodingMonitor
from data_prep.worker.parts import finish_data_set, remove_leftovers, whole_parts
from data_prep.worker.worker import Worker

NOT_OF_PARTS = ("output", "work", "device", "decoders", "claim_timeout", "changed")  # options that change no part
TINY_BUCKETS = (
    "warning: --buckets with --encoders tiny: at 256 px pictures get sides divisible by 16 px, and the tiny presets take sides "
    "divisible by 32 px, as their patch is 4; train with model.patch=2, or encode without --buckets"
)


def run(args: argparse.Namespace) -> int:
    """Encodes the missing parts; the worker that finds all of them done finishes the data set. Returns the exit code.

    Raises:
        ValueError: the output was made with other settings or from other tars, or two tars have the same name.
        OSError: tars or encoders are missing, or the output cannot be written.
    """
    device = args.device or default_device()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no GPU here; use --device cpu")
    if device == "cpu":
        keep_freed_memory()
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
        max_unknown=args.max_unknown,
    )
    there = set(whole_parts(root))
    survey_sources(sources, [j for j in jobs if j.name not in there], print, warn)
    if args.buckets and args.encoders == "tiny":
        warn(TINY_BUCKETS)
    encoder = Encoder(args.encoders, settings, device, args.compile, args.features)
    card = open_data_set(root, encoder, args, sources, remote)
    save_command(root, options_from(args), args.output)
    changed = check_parts(jobs, root, args.changed)
    whole = set(whole_parts(root)) - changed.keys()
    encoded = [j for j in jobs if j.name in whole]
    print(f"{counted_inputs([j.url for j in jobs])}, {len(encoded)} of them already encoded", flush=True)
    for difference in changed.values():
        print(f"made again: {difference}", flush=True)
    monitor = EncodingMonitor(
        sum(j.bytes for j in jobs), sum(j.bytes for j in encoded), root / schema.WORK / "tensorboard" / worker_name()
    )
    with (
        claims.Claims(root / schema.WORK / "claims", args.claim_timeout) as own_claims,
        DecoderPool(args.decoders, args.image_seconds, args.image_memory_mb << 20) as pool,
    ):
        worker = Worker(root, card, encoder, jobs, own_claims, pool, monitor, remote)
        try:
            if changed:
                remove_changed(root, jobs, changed, own_claims, remote)
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
        print(
            f"encode: {counted_inputs([j.url for j in jobs if j.name in failed])} could not be read; run this again:\n{names}",
            file=sys.stderr,
        )
        return 1
    if missing := [j.name for j in jobs if j.name not in encoded]:
        print(f"nothing is left for this worker; others are at work on {counted(len(missing), 'part')}")
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
    return [make_source(DEFAULT_SOURCE, args.input, args.captions, args.filter)]


def open_data_set(
    root: Path, encoder: Encoder, args: argparse.Namespace, sources: list[Source], remote: Remote | None
) -> schema.Card:
    """Starts the data set, or continues one that is there. Raises ValueError where that one has other settings."""
    card = encoder.card(args.text_dtype, args.features_dtype or "float16")
    choices = {
        "long_captions": args.long_captions,
        "duplicates": None if args.duplicates == "keep" else [args.duplicates, args.duplicate_distance],
        "compression": args.compression,
        "shard_mb": args.shard_mb,
        "max_unknown": args.max_unknown,
    }
    card.choices = {**choices, "sources": {s.name: s.choices for s in sorted(sources, key=lambda s: s.name)}}
    if (root / schema.CARD).exists():
        old = schema.Card.load(root)
        old_sources = old.choices.pop("sources")
        of_sources = {f"source {k}": v for k, v in old_sources.items()}
        absent = {"max_unknown": None, "features": None}  # of cards of earlier versions, or without features
        before = {**absent, **old.settings(), **old.choices, **of_sources}
        now = {**absent, **card.settings(), **choices, **{f"source {s.name}": s.choices for s in sources}}
        different = [k for k, v in now.items() if k in before and before[k] != v]
        if different and not is_empty(root):
            lines = [f"  {k}: there {before[k]}, now {now[k]}" for k in different]
            raise ValueError(f"{root} was made with other settings; choose another --output:\n" + "\n".join(lines))
        if different:
            print(f"{root} holds no sample: it is made anew, as these settings are others now: {', '.join(different)}")
            start_anew(root, remote)
        else:
            card.choices["sources"] = dict(sorted({**old_sources, **card.choices["sources"]}.items()))
    if not (root / schema.CARD).exists():
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
        if name in NOT_OF_PARTS or value is None or value is False:
            continue
        values = [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]
        if name == "input":  # one by one, as a path may begin with a dash
            values = [f"{option}={path}" for path in value]
        arguments += [option] if value is True else values
    return arguments


def check_parts(jobs: list[Job], root: Path, changed: str) -> dict[str, str]:
    """Returns the parts to be made again, as their inputs were changed, each with what differs.

    Raises ValueError, with all of them, unless `changed` says what to do: stop | remake | keep.
    """
    found = {} if changed == "keep" else changed_parts(root, jobs)
    if found and changed == "stop":
        lines = "\n".join(f"  {difference}" for difference in found.values())
        raise ValueError(
            f"changed since they were encoded: {len(found)}\n{lines}\nto make their parts again, add --changed remake; to leave "
            "these parts as they are, --changed keep"
        )
    return found


def warn(line: str) -> None:
    """Prints a line that a user should see, whatever the exit code."""
    print(line, file=sys.stderr, flush=True)


def worker_name() -> str:
    """Returns a name for this worker's TensorBoard run."""
    return re.sub(r"[^\w.-]", "_", f"{socket.gethostname()}-{os.environ.get('SLURM_JOB_ID', '')}-{os.getpid()}")


def error_line(error: Exception, args: Any) -> str:
    """Returns an error as one line, with the mend where the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space is left in {args.work or args.output} ({error}); every part that was finished is whole, and "
            "nothing else was kept: make room and run the same command again"
        )
    return str(error)
