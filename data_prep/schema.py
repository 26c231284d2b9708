"""The record, and where it lies: the only place where column names and encodings are spelled.

A data set's folder:

    dataset.json                  the card: what the records were made with, and how many there are
    null_text.safetensors         the encoded empty caption, for caption dropout and guidance
    report.json, .txt, *.png      what became of all samples (data_prep/worker/report.py)
    reports/SOURCE/PART.json      what became of each sample of a tar; its presence says that the part is whole
    reports/SOURCE/PART.jsonl     the samples of that tar that were dropped, each with its reason
    SOURCE/256-512/PART/…         MDS shards of the samples large enough for 512 px: they hold both resolutions
    SOURCE/256/PART/…             MDS shards of the others
    SOURCE/256-512/index.json     one index over all parts, for StreamingDataset
    work/                         claims, half-made parts, commands, TensorBoard: nothing of it belongs to the data set

With aspect-ratio buckets a set is one shape, too: SOURCE/256-512_15x17/. One tar in, one part out. A part is written under
work/, each of its folders is renamed into place whole, and it counts from the moment its report is there. A part's bytes
follow from its tar and the settings alone; so two workers that make the same one (a slow worker that was taken for dead) write
the same, and whichever comes second finds its folders in place.

With an output on object storage the folder is the local work folder: shards are uploaded and removed here, and the small files
are at both places.
"""

from __future__ import annotations

import filecmp
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from streaming import MDSWriter
from torch import Tensor

from data_prep.common import mds
from data_prep.common.files import atomic_write, temporary_name
from data_prep.common.storage import Remote

CARD, NULL_TEXT, REPORTS, INDEX, WORK = "dataset.json", "null_text.safetensors", "reports", "index.json", "work"
FORMAT = 3
SHARD_BYTES = 128 << 20
EIGHT_BITS = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
TEXT_DTYPES = ("bfloat16", *EIGHT_BITS)


@dataclass(frozen=True)
class Latent:
    """One resolution of one picture: the posterior's mean and, unless left out, its std, [C, h, w]."""

    mean: Tensor
    std: Tensor | None


@dataclass(frozen=True)
class Record:
    """One stored sample. `text` is [L, E] in bf16; `latents` by resolution in pixels; sizes are the original picture's."""

    key: str
    caption: str
    text: Tensor
    latents: dict[int, Latent]
    width: int
    height: int
    bucket: tuple[int, int] | None = None


@dataclass
class Card:
    """`dataset.json`: what every record was made with, and what there is.

    `choices` are those settings that every part shares but that a model does not depend on: how the sources are read.
    `sets` are the folders that hold an index, each with its source, resolutions, bucket, samples, shards and bytes.
    """

    text_encoder: dict[str, Any]
    vae: dict[str, Any]
    token_cap: int
    posterior: str
    resolutions: list[int]
    text_dtype: str = "bfloat16"
    latent_dtype: str = "float16"
    buckets: bool = False
    format: int = FORMAT
    choices: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    counts: dict[str, Any] = field(default_factory=dict)
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """The part of the card that a model depends on."""
        return {k: v for k, v in asdict(self).items() if k not in ("choices", "complete", "counts", "sets")}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the settings: two data sets with the same one can train the same model."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()

    def sets_with(self, resolution: int) -> dict[str, dict[str, Any]]:
        """The sets whose samples hold `resolution`, by their folders."""
        return {name: about for name, about in self.sets.items() if resolution in about["resolutions"]}

    def save(self, root: Path) -> None:
        write(root, CARD, json.dumps({**asdict(self), "fingerprint": self.fingerprint}, indent=2) + "\n")

    @classmethod
    def load(cls, root: Path) -> Card:
        """Reads a data set's card. Raises FileNotFoundError or ValueError with one clear line."""
        path = root / CARD
        if not path.is_file():
            raise FileNotFoundError(f"{root} is no data set: {CARD} is missing; make one with data_prep/encode.py")
        try:
            content = json.loads(path.read_text())
            stated = content.pop("fingerprint")
            card = cls(**content)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged or of another version ({error}); encode the data set again") from error
        if card.format != FORMAT or card.fingerprint != stated:
            raise ValueError(f"{path} was changed by hand or is of another version; encode the data set again")
        return card


# ---- the record ----


def columns(resolutions: Iterable[int], card: Card) -> dict[str, str]:
    """Column names and MDS encodings. MDS has neither bfloat16 nor 8-bit floats: their bits are stored as integers."""
    parts = ("mean", "std") if card.posterior == "mean_std" else ("mean",)
    latents = {f"latent_{r}_{part}": "ndarray:float16" for r in resolutions for part in parts}
    text = {"text": "ndarray:uint16"}
    if card.text_dtype in EIGHT_BITS:
        text = {"text": "ndarray:uint8", "text_scale": "ndarray:float32"}
    return {
        "key": "str",
        "caption": "str",
        "width": "int",
        "height": "int",
        **text,
        **latents,
        mds.CRC: mds.CRC_ENCODING,
    }


def to_row(record: Record, card: Card) -> dict[str, Any]:
    """A record in its stored form, yet without its checksum."""
    row: dict[str, Any] = {
        "key": record.key,
        "caption": record.caption,
        "width": record.width,
        "height": record.height,
        **_text_columns(record.text, card.text_dtype),
    }
    for resolution, latent in record.latents.items():
        row[f"latent_{resolution}_mean"] = latent.mean.half().numpy()
        if latent.std is not None:
            row[f"latent_{resolution}_std"] = latent.std.half().numpy()
    return row


def _text_columns(text_LE: Tensor, dtype: str) -> dict[str, np.ndarray]:
    if dtype == "bfloat16":
        return {"text": text_LE.view(torch.uint16).numpy()}
    largest = 127.0 if dtype == "int8" else torch.finfo(EIGHT_BITS[dtype]).max
    values = text_LE.float()
    scale_L1 = values.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
    scaled = values / scale_L1
    bits = (scaled.round() if dtype == "int8" else scaled).to(EIGHT_BITS[dtype]).view(torch.uint8)
    return {"text": bits.numpy(), "text_scale": scale_L1[:, 0].numpy()}


def size_of(value: Any) -> int:
    """The bytes of a stored value."""
    return value.nbytes if isinstance(value, np.ndarray | np.generic) else len(str(value).encode())


def text_of(row: dict[str, Any], dtype: str) -> Tensor:
    """A stored row's text [L, E] in bf16; `dtype` is the card's `text_dtype`."""
    bits = _tensor(row["text"])
    if dtype == "bfloat16":
        return bits.view(torch.bfloat16)
    scale_L = torch.from_numpy(row["text_scale"].copy())
    return (bits.view(EIGHT_BITS[dtype]).float() * scale_L[:, None]).bfloat16()


def latent_of(row: dict[str, Any], resolution: int) -> Latent:
    """A stored row's latent at a resolution, in fp16 as stored."""
    mean, std = row[f"latent_{resolution}_mean"], row.get(f"latent_{resolution}_std")
    return Latent(_tensor(mean), None if std is None else _tensor(std))


def _tensor(stored: np.ndarray) -> Tensor:
    """The same numbers; a copy only where they may not be written, of which torch warns."""
    return torch.from_numpy(stored if stored.flags.writeable else stored.copy())


def set_name(resolutions: Iterable[int], bucket: tuple[int, int] | None) -> str:
    """The folder, within its source's, of the samples that hold exactly these resolutions, of one bucket."""
    shape = "" if bucket is None else f"_{bucket[0]}x{bucket[1]}"
    return "-".join(str(r) for r in sorted(resolutions)) + shape


# ---- files ----


def write(root: Path, name: str, content: str | bytes) -> Path:
    """Writes a small file of the data set; it is absent, old, or whole, and a killed writer leaves nothing outside work/."""
    path, work = root / name, root / WORK
    for folder in (path.parent, work):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content, by=work)
    return path


# ---- parts ----


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
            _put(self._temporary / name, self.root / self.source / name / self.part)
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


def _put(folder: Path, place: Path) -> None:
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


def report_of(root: Path, name: str) -> dict[str, Any] | None:
    """The report of the whole part `source/part`; None while it is not made. Raises ValueError where it is damaged."""
    path = root / REPORTS / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the part is made again") from error


def made(root: Path) -> list[str]:
    """The names `source/part` of all whole parts, in order."""
    folder = root / REPORTS
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.glob("*/*.json"))


def reports(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every whole part with its report, by name."""
    for name in made(root):
        report = report_of(root, name)
        if report is not None:
            yield name, report


def remove(root: Path, name: str) -> None:
    """Takes a part out of the data set, its report first: it is missing from then on."""
    source, part = name.split("/")
    (root / REPORTS / f"{name}.json").unlink(missing_ok=True)
    (root / REPORTS / f"{name}.jsonl").unlink(missing_ok=True)
    for place in (root / source).glob(f"*/{glob.escape(part)}"):
        shutil.rmtree(place)


def clear(root: Path, whole: Collection[str]) -> None:
    """Removes what killed workers left of parts that are whole by now."""
    for folder in (root / WORK / "parts").glob("*/*"):
        if f"{folder.parent.name}/{folder.name}" in whole:
            shutil.rmtree(folder, ignore_errors=True)  # another worker may be at it, too


def finish(root: Path, card: Card, counts: dict[str, Any], remote: Remote | None = None) -> Card:
    """Writes each set's index over all whole parts, and the card; the same again for the same parts."""
    shards: dict[str, list[dict[str, Any]]] = {}
    about: dict[str, dict[str, Any]] = {}
    for name, report in reports(root):
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


# ---- the null text ----


def save_null_text(root: Path, text: Tensor) -> None:
    """Keeps the encoded empty caption [L, E] beside the card."""
    write(root, NULL_TEXT, save({"text": text}))


def load_null_text(root: Path) -> Tensor:
    """The encoded empty caption [L, E] in bf16."""
    if not (root / NULL_TEXT).is_file():
        raise FileNotFoundError(f"{root / NULL_TEXT} is missing; run data_prep/encode.py on this data set again")
    return load_file(root / NULL_TEXT)["text"]
