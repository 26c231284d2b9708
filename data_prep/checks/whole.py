"""Check of a whole data set, part by part and over all; the table of what was checked; a picture of some samples."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image

from data_prep import schema
from data_prep.checks.damage import Damage, Files, Json
from data_prep.checks.data_set import check_data_set, parts_in_report, read_card
from data_prep.checks.part import PartCheck, check_part
from data_prep.common import mds
from data_prep.common.progress import LOG_SECONDS, Progress
from data_prep.common.words import counted
from data_prep.encoders import Vae, default_device
from data_prep.pictures.grids import labelled_grid, to_image
from data_prep.worker import report as reports

STRAYS_SHOWN = 20


# ---- check ----


@dataclass
class Result:
    """Result of a check. `strays`: the number of files that belong to no part, by folder."""

    card: schema.Card | None
    parts: dict[str, PartCheck]
    damages: list[Damage]
    strays: dict[str, int]
    seconds: float


def check(files: Files, workers: int, known: dict[str, PartCheck] | None = None) -> Result:
    """Checks a data set, without the parts that are `known` to be whole. Takes the memory of two shards for each worker."""
    start = time.monotonic()
    files.list_files()
    card, damages = read_card(files)
    known = known or {}
    names = sorted({*files.parts(), *parts_in_report(files)})
    unchecked = sum(".mds" in name for name in files.sizes) - sum(p.shards for p in known.values())
    todo = [name for name in names if name not in known]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one for each worker: threads of threads wait for each other
    try:
        with (
            ThreadPoolExecutor(workers, "check") as pool,
            Progress(unchecked, "shard", line_seconds=LOG_SECONDS) as progress,
        ):
            found = pool.map(partial(check_part, files, card=card, on_shard=progress.update), todo)
            parts = known | {part.name: part for part in found}
    finally:
        torch.set_num_threads(threads)
    for name in names:
        damages += parts[name].damages
    damages += check_data_set(files, card, parts)
    return Result(card, parts, damages, _strays(files, parts), time.monotonic() - start)


def _strays(files: Files, parts: dict[str, PartCheck]) -> dict[str, int]:
    """Counts the files of each folder that belong to no part. Those of damaged parts are left out: not all are known."""
    known = {schema.CARD, schema.NULL_TEXT, reports.JSON, reports.TEXT, reports.TOKENS, reports.SIZES}
    for part in parts.values():
        known |= {*part.files, *(f"{part.name.split('/')[0]}/{set_}/{schema.INDEX}" for set_ in part.sets)}
    damaged = {part.name for part in parts.values() if part.damages}
    found: dict[str, int] = {}
    for name in files.sizes.keys() - known:
        folder, _, file = name.rpartition("/")
        source, *deeper = folder.split("/")
        of_damaged = f"{source}/{deeper[-1]}" in damaged if len(deeper) == 2 else damaged and file == schema.INDEX
        if not of_damaged:
            found[folder] = found.get(folder, 0) + 1
    return dict(sorted(found.items()))


def table(result: Result) -> str:
    """Returns as text what was checked, and every damage."""
    parts = result.parts.values()
    sets = {f"{p.name.split('/')[0]}/{set_}" for p in parts for set_ in p.sets}
    count = {name: sum(getattr(p, name) for p in parts) for name in ("shards", "bytes", "samples")}
    left_out = (
        "" if all(p.report_valid for p in parts) else "; sums over all parts cannot be: a part's report is damaged"
    )
    rate = count["shards"] / max(1e-9, result.seconds)
    rows = (
        ("parts", len(parts), f"{sum(not p.damages for p in parts)} whole: report, rejects, indexes"),
        ("sets", len(sets), "the index over all parts"),
        (
            "shards",
            count["shards"],
            f"{reports.size_text(count['bytes'])} by size, sha256 and content, {rate:.1f} shards/s",
        ),
        ("samples", count["samples"], "columns, shapes, finite values, std, keys"),
        ("others", 6, f"{schema.CARD}, {schema.NULL_TEXT}, {reports.JSON}, {reports.TEXT}, two pictures{left_out}"),
    )
    lines = [f"  {name:<8} {number:>11,}   {what}" for name, number, what in rows]
    strays = [
        f"warning: {folder or '.'}/: {counted(n, 'file')} of no whole part; nothing reads {'it' if n == 1 else 'them'}"
        for folder, n in result.strays.items()
    ]
    if len(strays) > STRAYS_SHOWN:
        strays[STRAYS_SHOWN:] = [f"warning: and {len(strays) - STRAYS_SHOWN} more folders with such files"]
    lines += [*strays, *(f"damaged: {damage}" for damage in result.damages)]
    return "\n".join([*lines, f"damages: {len(result.damages)}" if result.damages else "whole"])


# ---- sample ----


def sample(files: Files, count: int, seed: int, device: str | None) -> tuple[Image.Image, list[str]]:
    """Draws a grid of decoded latents with their captions; returns it and their keys. Each has its largest resolution.

    Raises ValueError where the VAE that the card names is not the one that encoded the data set.
    """
    files.list_files()
    card, damages = read_card(files)
    if card is None:
        raise ValueError(str(damages[0]))
    vae = Vae.of(card.vae, device or default_device())
    rows = list(_chosen(files, card, count, seed))
    pictures = [to_image(vae.decode(schema.latent_of(row, r).mean[None])[0]) for row, r in rows]
    return labelled_grid(pictures, [row["caption"] for row, _ in rows]), [row["key"] for row, _ in rows]


def _chosen(files: Files, card: schema.Card, count: int, seed: int) -> Iterator[tuple[Json, int]]:
    """Draws samples by the seed; yields them in the data set's order, each with its largest resolution."""
    total = sum(about["samples"] for about in card.sets.values())
    if not total:
        raise ValueError(f"{files.data} has no samples yet; run encode.py on it again")
    chosen = sorted(random.Random(seed).sample(range(total), min(count, total)))
    first = 0
    for folder, about in card.sets.items():
        columns = schema.columns(about["resolutions"], card)
        for shard in files.json(f"{folder}/{schema.INDEX}")["shards"]:
            inside = {n - first for n in chosen if first <= n < first + shard["samples"]}
            first += shard["samples"]
            if inside:
                stored = shard["zip_data"] or shard["raw_data"]
                data = mds.decompressed(files.read(f"{folder}/{stored['basename']}", keep=False), shard)
                rows = enumerate(mds.decode_rows(data, shard, columns))
                yield from ((row, max(about["resolutions"])) for n, row in rows if n in inside)
