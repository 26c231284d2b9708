"""Check of a part: its report, its shards by size, sha256 and content, and each of its samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from hashlib import sha256
from math import isfinite

from torch import Tensor

from data_prep import schema
from data_prep.checks.damage import MALFORMED, Damage, DamagedFile, Files, Json, collect_damage, difference
from data_prep.common import mds
from data_prep.pictures.images import BUCKETS, shape_of
from data_prep.worker import report as reports


@dataclass
class PartCheck:
    """Result of a part's check.

    Attributes:
        sets: those that its report names.
        files: the names of the files that belong to it.
        report_valid: its report holds together and can be used, whatever the state of its shards.
    """

    name: str
    damages: list[Damage] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    report_valid: bool = False
    samples: int = 0
    shards: int = 0
    bytes: int = 0


def check_part(files: Files, name: str, card: schema.Card | None, on_shard: Callable[[], None]) -> PartCheck:
    """Checks all of a part; without a card, all but its samples. `on_shard` is called after each shard."""
    return _PartChecker(files, name, card, on_shard).run()


class _PartChecker:
    def __init__(self, files: Files, name: str, card: schema.Card | None, on_shard: Callable[[], None]):
        self.files, self.card, self.on_shard = files, card, on_shard
        self.source, self.part = name.split("/")
        self.found = PartCheck(name)
        self._report_file = f"{schema.REPORTS}/{name}.json"
        self._keys: set[str] = set()
        self._written: Counter[str] = Counter()
        self._columns: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._sizes: Counter[str] = Counter()

    def run(self) -> PartCheck:
        with self._collect_damage():
            report = self._report()
            for set_, details in report["sets"].items():
                with self._collect_damage():
                    self._check_set(set_, details)
            if self.card is not None and not self.found.damages:
                self._compare(report)
            self.found.report_valid = self._report_file not in {d.file for d in self.found.damages}
        return self.found

    def _collect_damage(self) -> AbstractContextManager[None]:
        return collect_damage(self.found.damages, self.found.name)

    def _report(self) -> Json:
        """Reads the part's report. Raises DamagedFile where its sums, or its list of dropped samples, do not fit."""
        file, rejects_file = self._report_file, f"{schema.REPORTS}/{self.found.name}.jsonl"
        self.found.files += [file, rejects_file]
        report = self.files.json(file)
        try:
            read, written, dropped = report["read"], sum(report["written"].values()), sum(report["dropped"].values())
            if read != written + dropped:
                raise DamagedFile(file, f"read {read} is not written {written} + dropped {dropped}")
            if self.card is not None:
                reports.summary([(self.found.name, report)], self.card)
            if report["sets"].keys() != report["written"].keys():
                raise DamagedFile(file, "its sets are not those it says were written")
        except MALFORMED as error:
            raise DamagedFile(file, f"is no part's report ({type(error).__name__}: {error})") from error
        try:
            *lines, rest = self.files.text(rejects_file).split("\n")  # splitlines would split at a \u2028 in a key, too
            reasons = Counter(json.loads(line)["reason"] for line in lines)
        except MALFORMED as error:
            raise DamagedFile(
                rejects_file, f"is no list of dropped samples ({type(error).__name__}: {error})"
            ) from error
        if rest or reasons != report["dropped"]:
            other = difference(dict(reasons), report["dropped"], "dropped") or f"it ends in {rest!r}"
            raise DamagedFile(rejects_file, f"its {len(lines)} lines are not the {dropped} dropped ({other})")
        return report

    def _check_set(self, set_: str, details: Json) -> None:
        folder, card = f"{self.source}/{set_}/{self.part}", self.card
        index = f"{folder}/{schema.INDEX}"
        self.found.files.append(index)
        self.found.sets.append(set_)
        try:
            resolutions, bucket = details["resolutions"], details["bucket"] and tuple(details["bucket"])
            fits = set_ == schema.set_name(resolutions, bucket) and (bucket is None or bucket in BUCKETS)
            if card is not None:
                fits &= set(resolutions) <= set(card.resolutions) and card.buckets == (bucket is not None)
        except MALFORMED:
            fits = False
        if not fits:
            raise DamagedFile(self._report_file, f"its set {set_} is none that the card allows")
        content = self.files.json(index)
        try:
            entries = content["shards"]
            for shard in entries:
                for data in filter(None, (shard["raw_data"], shard["zip_data"])):
                    if "/" in data["basename"] or not data["hashes"]["sha256"] or data["bytes"] < 0:
                        raise ValueError(f"shard {data['basename']}")
                if len(shard["column_names"]) != len(shard["column_encodings"]) or shard["samples"] < 1:
                    raise ValueError("columns or samples")
                if (shard["zip_data"] is None) != (shard["compression"] is None):
                    raise ValueError(f"compression {shard['compression']}")
        except MALFORMED as error:
            raise DamagedFile(index, f"is no index of shards ({type(error).__name__}: {error})") from error
        for shard in entries:
            with self._collect_damage():
                self._check_shard(folder, set_, shard, details)
            self.on_shard()

    def _check_shard(self, folder: str, set_: str, shard: Json, details: Json) -> None:
        """Checks a shard: its file by size and hash, its uncompressed bytes, and all samples."""
        raw, stored = shard["raw_data"], shard["zip_data"] or shard["raw_data"]
        name, raw_name = f"{folder}/{stored['basename']}", f"{folder}/{raw['basename']}"
        self.found.files.append(name)
        data = self._shard_file(name, stored)
        if stored is not raw and raw_name in self.files.sizes:  # decompressed by streaming, which reads it from then on
            self.found.files.append(raw_name)
            self._shard_file(raw_name, raw)
        self.found.shards += 1
        self.found.bytes += len(data)
        try:
            if stored is not raw:
                data = mds.decompressed(data, shard)
                if len(data) != raw["bytes"] or sha256(data).hexdigest() != raw["hashes"]["sha256"]:
                    raise ValueError("unpacks to other bytes than its index says")
            bad = [] if self.card is None else list(self._problems(data, shard, set_, details, self.card))
        except ValueError as error:
            raise DamagedFile(name, str(error)) from error
        if bad:
            raise DamagedFile(name, f"{len(bad)} of its {shard['samples']} samples are damaged; the first is {bad[0]}")

    def _problems(self, data: bytes, shard: Json, set_: str, details: Json, card: schema.Card) -> Iterator[str]:
        """Yields the damaged samples of a shard with their problems, and counts the others."""
        for row in mds.decode_rows(data, shard, schema.columns(details["resolutions"], card)):
            self.found.samples += 1
            key, problem = row["key"], sample_problem(row, self.found.name, card, details)
            if key in self._keys:
                problem = "its key occurs twice"
            self._keys.add(key)
            if problem:
                yield f"{key}: {problem}"
                continue
            self._written[set_] += 1
            self._tokens[str(len(row["text"]))] += 1
            self._sizes[str(min(row["width"], row["height"]) // reports.SIZE_STEP * reports.SIZE_STEP)] += 1
            for column, value in row.items():
                self._columns[column] += schema.stored_size(value)

    def _shard_file(self, name: str, about: Json) -> bytes:
        size = self.files.sizes.get(name)
        if size is not None and size != about["bytes"]:
            raise DamagedFile(name, f"has {size} bytes, its index says {about['bytes']}")
        data = self.files.read(name, keep=False)
        if sha256(data).hexdigest() != about["hashes"]["sha256"]:
            raise DamagedFile(name, "its sha256 is not the one in its index")
        return data

    def _compare(self, report: Json) -> None:
        """Compares the counts of the samples with those of the report."""
        found = {
            "written": dict(self._written),
            "tokens": dict(self._tokens),
            "sizes": dict(self._sizes),
            "column_bytes": dict(self._columns),
            "stored_bytes": self.found.bytes,
        }
        if other := difference({k: report[k] for k in found}, found):
            raise DamagedFile(self._report_file, other)


def sample_problem(row: Json, part: str, card: schema.Card, details: Json) -> str | None:
    """Returns what is wrong with a stored sample of a set, in a few words; None where nothing is."""
    if not row["key"].startswith(f"{part}/"):
        return f"its key does not start with {part}/"
    if not row["caption"].strip():
        return "its caption is empty"
    shape, width = row["text"].shape, card.text_encoder["width"]
    if len(shape) != 2 or not 1 <= shape[0] <= card.token_cap or shape[1] != width:
        return f"text is {shape}, expected (1 to {card.token_cap}, {width})"
    if card.text_dtype in schema.EIGHT_BITS and row["text_scale"].shape != shape[:1]:
        return f"text_scale is {row['text_scale'].shape}, expected {shape[:1]}"
    if card.text_dtype in schema.EIGHT_BITS and not (row["text_scale"] > 0).all():
        return "text_scale is not above 0 everywhere"
    if not _finite(schema.text_of(row, card.text_dtype)):
        return "text is not finite"
    for r in card.resolutions:
        bucket = details["bucket"]
        height_px, width_px = shape_of(bucket, r) if bucket else (r, r)
        large_enough = height_px <= row["height"] and width_px <= row["width"]
        if large_enough != (r in details["resolutions"]):
            return f"its picture of {row['width']} × {row['height']} pixels belongs to another set"
        if not large_enough:
            continue
        latent, down = schema.latent_of(row, r), card.vae["downsample"]
        expected = (card.vae["channels"], height_px // down, width_px // down)
        for part_, values in (("mean", latent.mean), ("std", latent.std)):
            if values is None:
                continue
            if values.shape != expected:
                return f"latent_{r}_{part_} is {tuple(values.shape)}, expected {expected}"
            if not _finite(values):
                return f"latent_{r}_{part_} is not finite"
        if latent.std is not None and latent.std.min() < 0:
            return f"latent_{r}_std is below 0"
        if problem := _features_problem(row, r, (height_px, width_px), card):
            return problem
    return None


def _features_problem(row: Json, resolution: int, size: tuple[int, int], card: schema.Card) -> str | None:
    """Returns what is wrong with the features of a picture of (height, width) pixels."""
    about, column = card.features, f"features_{resolution}"
    if about is None:
        return None
    expected = (*(side // about["cell"] for side in size), about["width"])
    if row[column].shape != expected:
        return f"{column} is {row[column].shape}, expected {expected}"
    if about["dtype"] in schema.EIGHT_BITS:
        scale = row[f"{column}_scale"]
        if scale.shape != expected[:2] or not (scale > 0).all():
            return f"{column}_scale is not {expected[:2]}, or not above 0 everywhere"
    return None if _finite(schema.features_of(row, resolution, about["dtype"])) else f"{column} is not finite"


def _finite(values: Tensor) -> bool:
    """Returns whether all values are finite; by their extremes, which takes a tenth of the time of testing each one."""
    return all(isfinite(float(extreme)) for extreme in values.aminmax())
