"""The record, and where it lies: the only place where column names and encodings are spelled.

A data set's folder:

    dataset.json             the card: what the records were made with, and how many there are
    null_text.safetensors    the encoded empty caption, for caption dropout and guidance
    reports/PART.json        what became of each sample of a tar; its presence says that the part is whole
    256-512/PART/…           MDS shards of the samples large enough for 512 px: they hold both resolutions
    256/PART/…               MDS shards of the others
    256-512/index.json, …    one index over all parts, for StreamingDataset

One tar in, one part out. A part is written under `.tmp-…`, renamed into place, and counts from the moment its report is
there; whatever a killed writer left without a report is removed and made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from streaming import MDSWriter
from torch import Tensor

from data_prep.files import temporary_name, write_whole

CARD, NULL_TEXT, REPORTS, INDEX = "dataset.json", "null_text.safetensors", "reports", "index.json"
FORMAT = 1
SHARD_BYTES = 128 << 20


@dataclass(frozen=True)
class Latent:
    """One resolution of one picture: the posterior's mean and, unless left out, its std, [C, h, w] in fp32."""

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


@dataclass
class Card:
    """`dataset.json`: what every record was made with (the settings), and what there is (the rest)."""

    text_encoder: dict[str, Any]
    vae: dict[str, Any]
    token_cap: int
    posterior: str
    resolutions: list[int]
    text_dtype: str = "bfloat16"
    latent_dtype: str = "float16"
    format: int = FORMAT
    complete: bool = False
    counts: dict[str, Any] = field(default_factory=dict)
    sets: dict[str, dict[str, int]] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """The part of the card that must be the same for all parts."""
        return {k: v for k, v in asdict(self).items() if k not in ("complete", "counts", "sets")}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the settings: two data sets with the same one can train the same model."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()

    def save(self, root: Path) -> None:
        write_whole(root / CARD, json.dumps({**asdict(self), "fingerprint": self.fingerprint}, indent=2) + "\n")

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


def columns(resolutions: Iterable[int], posterior: str) -> dict[str, str]:
    """Column names and MDS encodings. MDS has no bfloat16: the text's bits are stored as uint16."""
    latents = {f"latent_{r}_{part}": "ndarray:float16" for r in resolutions for part in _parts(posterior)}
    return {"key": "str", "caption": "str", "width": "int", "height": "int", "text": "ndarray:uint16", **latents}


def _parts(posterior: str) -> tuple[str, ...]:
    return ("mean", "std") if posterior == "mean_std" else ("mean",)


def to_row(record: Record) -> dict[str, Any]:
    """A record in its stored form."""
    row: dict[str, Any] = {
        "key": record.key,
        "caption": record.caption,
        "width": record.width,
        "height": record.height,
        "text": record.text.view(torch.uint16).numpy(),
    }
    for resolution, latent in record.latents.items():
        row[f"latent_{resolution}_mean"] = latent.mean.half().numpy()
        if latent.std is not None:
            row[f"latent_{resolution}_std"] = latent.std.half().numpy()
    return row


def text_of(row: dict[str, Any]) -> Tensor:
    """A stored row's text [L, E] in bf16."""
    return torch.from_numpy(row["text"].copy()).view(torch.bfloat16)


def latent_of(row: dict[str, Any], resolution: int) -> Latent:
    """A stored row's latent at a resolution, in fp32."""
    mean, std = row[f"latent_{resolution}_mean"], row.get(f"latent_{resolution}_std")
    return Latent(
        torch.from_numpy(mean.astype(np.float32)), None if std is None else torch.from_numpy(std.astype(np.float32))
    )


def set_name(resolutions: Iterable[int]) -> str:
    """The folder of the samples that hold exactly these resolutions."""
    return "-".join(str(r) for r in sorted(resolutions))


def all_sets(resolutions: Iterable[int]) -> list[list[int]]:
    """The resolutions of each set: a picture that is large enough for one is so for all below."""
    ordered = sorted(resolutions)
    return [ordered[: i + 1] for i in range(len(ordered))]


def sets_with(card: Card, resolution: int) -> list[str]:
    """The sets whose samples hold `resolution`."""
    return [set_name(s) for s in all_sets(card.resolutions) if resolution in s]


# ---- parts ----


class PartWriter:
    """Writes one part. Use as a context; nothing shows in the data set until `commit`."""

    def __init__(self, root: Path, part: str, card: Card):
        self.root, self.part, self.card = root, part, card
        self.written: dict[str, int] = {}
        self._writers: dict[str, MDSWriter] = {}
        self._temporary = root / temporary_name(part)

    def __enter__(self) -> PartWriter:
        _remove_leftovers(self.root, self.part, self.card)
        self._stack = ExitStack()
        return self

    def write(self, record: Record) -> None:
        name = set_name(record.latents)
        if name not in self._writers:
            out = str(self._temporary / name)
            layout = columns(record.latents, self.card.posterior)
            writer = MDSWriter(out=out, columns=layout, hashes=["sha256"], size_limit=SHARD_BYTES)
            self._writers[name] = self._stack.enter_context(writer)
        self._writers[name].write(to_row(record))
        self.written[name] = self.written.get(name, 0) + 1

    def commit(self, report: dict[str, Any]) -> None:
        """Finishes the shards, renames them into place, and writes the part's report last."""
        self._stack.close()
        for name in self._writers:
            (self.root / name).mkdir(exist_ok=True)
            (self._temporary / name).rename(self.root / name / self.part)
        (self.root / REPORTS).mkdir(exist_ok=True)
        write_whole(self.root / REPORTS / f"{self.part}.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._stack.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


def _remove_leftovers(root: Path, part: str, card: Card) -> None:
    """What a killed writer of this part left: its folders without a report, and its temporary ones."""
    for resolutions in all_sets(card.resolutions):
        shutil.rmtree(root / set_name(resolutions) / part, ignore_errors=True)
    for folder in root.glob(f".tmp-{part}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def report_of(root: Path, part: str) -> dict[str, Any] | None:
    """A whole part's report; None while the part is not made."""
    path = root / REPORTS / f"{part}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def reports(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every whole part with its report, by name."""
    for path in sorted((root / REPORTS).glob("*.json")):
        yield path.stem, json.loads(path.read_text(encoding="utf-8"))


def finish(root: Path, card: Card) -> Card:
    """Writes each set's index over all whole parts, and the card with the counts; the same again for the same parts."""
    parts = dict(reports(root))
    dropped: dict[str, int] = {}
    for report in parts.values():
        for reason, count in report["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
    card.sets = {}
    for resolutions in all_sets(card.resolutions):
        name = set_name(resolutions)
        shards = [s for part, report in parts.items() if name in report["written"] for s in _shards(root, name, part)]
        if shards:
            card.sets[name] = {"samples": sum(s["samples"] for s in shards), "shards": len(shards)}
            write_whole(root / name / INDEX, json.dumps({"version": 2, "shards": shards}) + "\n")
    card.counts = {
        "parts": len(parts),
        "read": sum(r["read"] for r in parts.values()),
        "written": sum(s["samples"] for s in card.sets.values()),
        "dropped": dict(sorted(dropped.items())),
        "captions_cut": sum(r["captions_cut"] for r in parts.values()),
    }
    card.complete = True
    card.save(root)
    return card


def _shards(root: Path, name: str, part: str) -> list[dict[str, Any]]:
    """A part's shards with names as seen from the set's folder."""
    shards = json.loads((root / name / part / INDEX).read_text())["shards"]
    for shard in shards:
        for data in (shard["raw_data"], shard["zip_data"]):
            if data is not None:
                data["basename"] = f"{part}/{data['basename']}"
    return shards


# ---- the null text ----


def save_null_text(root: Path, text: Tensor) -> None:
    """Keeps the encoded empty caption [L, E] beside the card."""
    temporary = root / temporary_name(NULL_TEXT)
    save_file({"text": text}, temporary)
    temporary.replace(root / NULL_TEXT)


def load_null_text(root: Path) -> Tensor:
    """The encoded empty caption [L, E] in bf16."""
    if not (root / NULL_TEXT).is_file():
        raise FileNotFoundError(f"{root / NULL_TEXT} is missing; run data_prep/encode.py on this data set again")
    return load_file(root / NULL_TEXT)["text"]
