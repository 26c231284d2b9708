"""Parts of a data set: written, renamed into place whole, listed, removed, and joined under one index and one card.

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
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from streaming import MDSWriter
from torch import Tensor

from data_prep.common import mds
from data_prep.common.files import sync_path, temporary_name
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
    features_of,
    set_name,
    stored_size,
    text_of,
    to_row,
    write_file,
)


class PartWriter:
    """Writer of the part `source/part` of a data set. For use as a context; the data set is unchanged until `commit`.

    `token` is different for every writer, and names its temporary folder.
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
        self.errors: dict[str, list[float]] = {}  # sums of squares: of the error of 8 bits, of the values
        self._writers: dict[str, MDSWriter] = {}
        self._temporary = root / WORK / "parts" / self.source / self.part / token

    def __enter__(self) -> PartWriter:
        shutil.rmtree(self._temporary.parent, ignore_errors=True)  # left by a writer that died
        return self

    def write(self, record: Record) -> None:
        """Adds a record to the shards of its set, which follows from its resolutions and bucket."""
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
        row = mds.with_checksum(to_row(record, self.card), writer.encode_sample)
        for column, value in row.items():
            self.bytes[column] = self.bytes.get(column, 0) + stored_size(value)
        if self.card.text_dtype in EIGHT_BITS:
            self._add_error("text", record.text, text_of(row, self.card.text_dtype))
        if self.card.features is not None and (dtype := self.card.features["dtype"]) in EIGHT_BITS:
            for resolution, features in record.features.items():
                self._add_error("features", features, features_of(row, resolution, dtype))
        writer.write(row)
        self.written[name] = self.written.get(name, 0) + 1

    def _add_error(self, what: str, exact: Tensor, stored: Tensor) -> None:
        sums, exact = self.errors.setdefault(what, [0.0, 0.0]), exact.float()
        sums[0] += float((stored.float() - exact).square().sum())
        sums[1] += float(exact.square().sum())

    def error(self, what: str) -> float | None:
        """Returns by how much 8 bits change the `text` or the `features`, as a share (root mean square); None in 16 bits."""
        error, values = self.errors.get(what, (0.0, 0.0))
        return round((error / values) ** 0.5, 6) if values else None

    def finish(self) -> int:
        """Closes the shards and syncs them to the disk; returns their size in bytes."""
        for writer in self._writers.values():
            writer.finish()
        shards = list(self._temporary.rglob("*.mds*"))
        for shard in shards:
            sync_path(shard)
        return sum(s.stat().st_size for s in shards)

    def commit(self, report: dict[str, Any], rejects: list[dict[str, str]]) -> None:
        """Moves the finished shards into place, or uploads them, and writes the part's report last."""
        if self.remote is not None:
            for name in self._writers:
                self.remote.upload(self._temporary / name, f"{self.source}/{name}/{self.part}")
                for shard in (self._temporary / name).glob("*.mds*"):
                    shard.unlink()
        for stale in (self.root / self.source).glob(f"*/{glob.escape(self.part)}"):
            if stale.parent.name not in self._writers:
                shutil.rmtree(stale)  # written when the tar had other samples
        for name in self._writers:
            _move_into_place(self._temporary / name, self.root / self.source / name / self.part)
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejects)
        name = f"{REPORTS}/{self.source}/{self.part}.json"
        for path_name, content in (
            (f"{name}l", lines),
            (name, json.dumps(report, indent=1, ensure_ascii=False) + "\n"),
        ):
            path = write_file(self.root, path_name, content)
            if self.remote is not None:
                self.remote.upload(path, path_name)

    def __exit__(self, *error: object) -> None:
        for writer in self._writers.values():
            writer.cancel_future_jobs()
        shutil.rmtree(self._temporary, ignore_errors=True)
        with suppress(OSError):  # not there, or another worker writes in it
            self._temporary.parent.rmdir()


def _move_into_place(folder: Path, target: Path) -> None:
    """Renames a folder into place. An equal folder that is there stays: another worker may be reading it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        files = sorted(p.name for p in folder.iterdir())
        if filecmp.cmpfiles(folder, target, files, shallow=False)[0] == files:
            return
        aside = folder.with_name(temporary_name(folder.name))
        target.rename(aside)
        shutil.rmtree(aside)
    folder.rename(target)


def read_part_report(root: Path, name: str) -> dict[str, Any] | None:
    """Reads the report of the part `source/part`; None where there is no whole part. Raises ValueError where damaged."""
    path = root / REPORTS / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the part is made again") from error


def whole_parts(root: Path) -> list[str]:
    """Lists the names `source/part` of all whole parts, sorted."""
    folder = root / REPORTS
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.glob("*/*.json"))


def part_reports(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each whole part's name and report, sorted by name."""
    for name in whole_parts(root):
        report = read_part_report(root, name)
        if report is not None:
            yield name, report


def remove_part(root: Path, name: str) -> None:
    """Removes a part from the data set, its report first: without one, the part counts as missing."""
    source, part = name.split("/")
    (root / REPORTS / f"{name}.json").unlink(missing_ok=True)
    (root / REPORTS / f"{name}.jsonl").unlink(missing_ok=True)
    for folder in (root / source).glob(f"*/{glob.escape(part)}"):
        shutil.rmtree(folder)


def remove_leftovers(root: Path, whole: Collection[str]) -> None:
    """Removes the temporary folders that killed workers left of parts that are whole by now."""
    for folder in (root / WORK / "parts").glob("*/*"):
        if f"{folder.parent.name}/{folder.name}" in whole:
            shutil.rmtree(folder, ignore_errors=True)  # another worker may be removing it, too


def finish_data_set(root: Path, card: Card, counts: dict[str, Any], remote: Remote | None = None) -> Card:
    """Writes each set's index over all whole parts, and the card; the same bytes for the same parts."""
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
        write_file(root, f"{folder}/{INDEX}", json.dumps({"version": 2, "shards": entries}) + "\n")
        if remote is not None:
            remote.upload(root / folder / INDEX, f"{folder}/{INDEX}")
    card.sets, card.counts, card.complete = about, counts, True
    card.save(root)
    if remote is not None:
        remote.upload(root / CARD, CARD)
    return card


def count_samples(about: dict[str, dict[str, Any]], source: str, report: dict[str, Any]) -> None:
    """Adds the samples of a part's report to `about`: the card's entries of the sets, by their folders."""
    for set_, details in report["sets"].items():
        there = about.setdefault(f"{source}/{set_}", {"source": source, **details, "samples": 0})
        there["samples"] += report["written"][set_]


def count_shards(entries: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Returns number and bytes of a set's shards for the card, from the entries of its index."""
    sizes = [(s["zip_data"] or s["raw_data"])["bytes"] for s in entries]
    return {"shards": len(sizes), "bytes": sum(sizes)}


def part_shards(folder: Path, part: str) -> list[dict[str, Any]]:
    """Returns the index entries of a part's shards, with file names relative to the set's folder."""
    shards = json.loads((folder / part / INDEX).read_text())["shards"]
    for shard in shards:
        for data in (shard["raw_data"], shard["zip_data"]):
            if data is not None:
                data["basename"] = f"{part}/{data['basename']}"
    return shards
