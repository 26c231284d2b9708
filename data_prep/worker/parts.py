"""The parts of a data set: written, renamed into place whole, listed, removed, and joined under one index and one card.

A part is written under work/, each of its folders is renamed into place whole, and it counts from the moment its report is
there. A part's bytes follow from its tar and the settings alone; so two workers that make the same one (a slow worker that was
taken for dead) write the same, and the second finds its folders in place.

With an output on object storage the data set's folder is the local work folder: shards are uploaded and removed here, and the
small files are at both places.
"""

from __future__ import annotations

import filecmp
import glob
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from streaming import MDSWriter

from data_prep.common import mds
from data_prep.common.files import temporary_name
from data_prep.common.storage import Remote
from data_prep.schema import (
    CARD,
    EIGHT_BITS,
    INDEX,
    REPORTS,
    SHARD_BYTES,
    WORK,
    Card,
    Record,
    columns,
    set_name,
    size_of,
    text_of,
    to_row,
    write,
)


class PartWriter:
    """Writes the part `source/part` of a data set. Use as a context; nothing shows in the data set until `commit`.

    `token` tells this writer's half-made files from those of any other one.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        card: Card,
        token: str,
        remote: Remote | None = None,
        compression: str | None = None,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.root, self.card, self.remote = root, card, remote
        self.compression, self.shard_bytes = compression, shard_bytes
        self.source, self.part = name.split("/")
        self.written: dict[str, int] = {}
        self.sets: dict[str, dict[str, Any]] = {}
        self.bytes: dict[str, int] = {}
        self.text_error = [0.0, 0.0]  # sums of squares: of what 8 bits lost, of what there was
        self._writers: dict[str, MDSWriter] = {}
        self._temporary = root / WORK / "parts" / self.source / self.part / token

    def __enter__(self) -> PartWriter:
        shutil.rmtree(self._temporary.parent, ignore_errors=True)  # of a writer that died
        return self

    def write(self, record: Record) -> None:
        """Adds a record to the shards of its set, which is that of its resolutions and bucket."""
        name = set_name(record.latents, record.bucket)
        if name not in self._writers:
            self.sets[name] = {"resolutions": sorted(record.latents), "bucket": record.bucket}
            self._writers[name] = MDSWriter(
                out=str(self._temporary / name),
                columns=columns(record.latents, self.card),
                hashes=["sha256"],
                size_limit=self.shard_bytes,
                compression=self.compression,
            )
        writer = self._writers[name]
        row = mds.sealed(to_row(record, self.card), writer.encode_sample)
        for column, value in row.items():
            self.bytes[column] = self.bytes.get(column, 0) + size_of(value)
        if self.card.text_dtype in EIGHT_BITS:
            was = record.text.float()
            self.text_error[0] += float((text_of(row, self.card.text_dtype).float() - was).square().sum())
            self.text_error[1] += float(was.square().sum())
        writer.write(row)
        self.written[name] = self.written.get(name, 0) + 1

    def finish(self) -> int:
        """Ends the shards, which are on the disk from then on; returns the bytes that they take."""
        for writer in self._writers.values():
            writer.finish()
        shards = list(self._temporary.rglob("*.mds*"))
        for shard in shards:
            with shard.open("rb") as file:
                os.fsync(file.fileno())
        return sum(s.stat().st_size for s in shards)

    def commit(self, report: dict[str, Any], rejects: list[dict[str, str]]) -> None:
        """Moves the finished shards into place, and writes the part's report last."""
        if self.remote is not None:
            for name in self._writers:
                self.remote.upload(self._temporary / name, f"{self.source}/{name}/{self.part}")
                for shard in (self._temporary / name).glob("*.mds*"):
                    shard.unlink()
        for stale in (self.root / self.source).glob(f"*/{glob.escape(self.part)}"):
            if stale.parent.name not in self._writers:
                shutil.rmtree(stale)  # of a tar that had other samples
        for name in self._writers:
            _move_into_place(self._temporary / name, self.root / self.source / name / self.part)
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejects)
        name = f"{REPORTS}/{self.source}/{self.part}.json"
        for place, content in ((f"{name}l", lines), (name, json.dumps(report, indent=1, ensure_ascii=False) + "\n")):
            path = write(self.root, place, content)
            if self.remote is not None:
                self.remote.upload(path, place)

    def __exit__(self, *error: object) -> None:
        for writer in self._writers.values():
            writer.cancel_future_jobs()
        shutil.rmtree(self._temporary, ignore_errors=True)
        with suppress(OSError):  # it never was, or another worker is at work in it
            self._temporary.parent.rmdir()


def _move_into_place(folder: Path, place: Path) -> None:
    """Renames a folder into place. What is there already stays if it is the same: another worker may just count it in."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir():
        files = sorted(p.name for p in folder.iterdir())
        if filecmp.cmpfiles(folder, place, files, shallow=False)[0] == files:
            return
        aside = folder.with_name(temporary_name(folder.name))
        place.rename(aside)
        shutil.rmtree(aside)
    folder.rename(place)


def read_part_report(root: Path, name: str) -> dict[str, Any] | None:
    """The report of the whole part `source/part`; None while it is not made. Raises ValueError where it is damaged."""
    path = root / REPORTS / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the part is made again") from error


def whole_parts(root: Path) -> list[str]:
    """The names `source/part` of all whole parts, in order."""
    folder = root / REPORTS
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.glob("*/*.json"))


def part_reports(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every whole part with its report, by name."""
    for name in whole_parts(root):
        report = read_part_report(root, name)
        if report is not None:
            yield name, report


def remove_part(root: Path, name: str) -> None:
    """Takes a part out of the data set, its report first: it is missing from then on."""
    source, part = name.split("/")
    (root / REPORTS / f"{name}.json").unlink(missing_ok=True)
    (root / REPORTS / f"{name}.jsonl").unlink(missing_ok=True)
    for place in (root / source).glob(f"*/{glob.escape(part)}"):
        shutil.rmtree(place)


def remove_leftovers(root: Path, whole: Collection[str]) -> None:
    """Removes what killed workers left of parts that are whole by now."""
    for folder in (root / WORK / "parts").glob("*/*"):
        if f"{folder.parent.name}/{folder.name}" in whole:
            shutil.rmtree(folder, ignore_errors=True)  # another worker may be at it, too


def finish_data_set(root: Path, card: Card, counts: dict[str, Any], remote: Remote | None = None) -> Card:
    """Writes each set's index over all whole parts, and the card; the same again for the same parts."""
    shards: dict[str, list[dict[str, Any]]] = {}
    about: dict[str, dict[str, Any]] = {}
    for name, report in part_reports(root):
        source, part = name.split("/")
        count_samples(about, source, report)
        for set_ in report["sets"]:
            folder = f"{source}/{set_}"
            shards.setdefault(folder, []).extend(part_shards(root / folder, part))
    for folder, entries in shards.items():
        about[folder] |= count_shards(entries)
        write(root, f"{folder}/{INDEX}", json.dumps({"version": 2, "shards": entries}) + "\n")
        if remote is not None:
            remote.upload(root / folder / INDEX, f"{folder}/{INDEX}")
    card.sets, card.counts, card.complete = about, counts, True
    card.save(root)
    if remote is not None:
        remote.upload(root / CARD, CARD)
    return card


def count_samples(about: dict[str, dict[str, Any]], source: str, report: dict[str, Any]) -> None:
    """Adds a part's report to what the card says of the sets, by their folders."""
    for set_, details in report["sets"].items():
        there = about.setdefault(f"{source}/{set_}", {"source": source, **details, "samples": 0})
        there["samples"] += report["written"][set_]


def count_shards(entries: Iterable[dict[str, Any]]) -> dict[str, int]:
    """What the card says of a set's shards, by its index."""
    sizes = [(s["zip_data"] or s["raw_data"])["bytes"] for s in entries]
    return {"shards": len(sizes), "bytes": sum(sizes)}


def part_shards(folder: Path, part: str) -> list[dict[str, Any]]:
    """A part's shards with names as seen from the set's folder."""
    shards = json.loads((folder / part / INDEX).read_text())["shards"]
    for shard in shards:
        for data in (shard["raw_data"], shard["zip_data"]):
            if data is not None:
                data["basename"] = f"{part}/{data['basename']}"
    return shards
