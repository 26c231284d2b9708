"""Schema of a data set: its folder, its card, and the stored record with its column names and encodings.

A data set's folder:

    dataset.json                  the card: the settings that the records were made with, and their number
    null_text.safetensors         the encoded empty caption, for caption dropout and guidance
    report.json, .txt, *.png      counts of all samples read, written and dropped (data_prep/worker/report.py)
    reports/SOURCE/PART.json      the same counts for one tar; its presence says that the part is whole
    reports/SOURCE/PART.jsonl     the samples of that tar that were dropped, each with its reason
    SOURCE/256-512/PART/…         MDS shards of the samples large enough for 512 px: they hold both resolutions
    SOURCE/256/PART/…             MDS shards of the others
    SOURCE/256-512/index.json     one index over all parts, for StreamingDataset
    work/                         claims, unfinished parts, commands, TensorBoard: not part of the data set

With aspect-ratio buckets a set has one shape, too: SOURCE/256-512_15x17/. Each tar becomes one part; data_prep/worker/parts.py
writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from data_prep.common import mds
from data_prep.common.files import atomic_write
from data_prep.encoders import FEATURE_CELL

CARD, NULL_TEXT, REPORTS, INDEX, WORK = "dataset.json", "null_text.safetensors", "reports", "index.json", "work"
FORMAT = 3
SHARD_BYTES = 128 << 20
EIGHT_BITS = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
TEXT_DTYPES = ("bfloat16", *EIGHT_BITS)
FEATURE_DTYPES = ("float16", *EIGHT_BITS)


@dataclass(frozen=True)
class Latent:
    """Latent of a picture at one resolution: the posterior's mean and, unless left out, its std, both [C, h, w]."""

    mean: Tensor
    std: Tensor | None


@dataclass(frozen=True)
class Record:
    """Stored sample. `text` is [L, E] in bf16; sizes are the original picture's, in pixels.

    `latents` are by resolution in pixels; so are `features`, a vision encoder's [h, w, F] in fp16, which most data sets lack.
    """

    key: str
    caption: str
    text: Tensor
    latents: dict[int, Latent]
    width: int
    height: int
    bucket: tuple[int, int] | None = None
    features: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Card:
    """Card of a data set, `dataset.json`: the settings that every record was made with, and counts.

    `features` describes the vision encoder whose features the samples have: name, width, pixels of a cell, dtype, fingerprint.
    Without them the card has no such entry.
    `choices` are settings that every part shares but that a model does not depend on: how the sources are read.
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
    features: dict[str, Any] | None = None
    format: int = FORMAT
    choices: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    counts: dict[str, Any] = field(default_factory=dict)
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Returns the settings that a model depends on."""
        return {k: v for k, v in self._content().items() if k not in ("choices", "complete", "counts", "sets")}

    def _content(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "features" or v is not None}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the settings: data sets with equal fingerprints can train the same model."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()

    def sets_with(self, resolution: int) -> dict[str, dict[str, Any]]:
        """Returns the sets whose samples hold `resolution`, by their folders."""
        return {name: about for name, about in self.sets.items() if resolution in about["resolutions"]}

    def save(self, root: Path) -> None:
        write_file(root, CARD, json.dumps({**self._content(), "fingerprint": self.fingerprint}, indent=2) + "\n")

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
    """Returns column names with MDS encodings. MDS has no bfloat16 and no 8-bit floats: bits are stored as integers."""
    parts = ("mean", "std") if card.posterior == "mean_std" else ("mean",)
    found = {"key": "str", "caption": "str", "width": "int", "height": "int"}
    found |= _vector_encodings("text", card.text_dtype)
    found |= {f"latent_{r}_{part}": "ndarray:float16" for r in resolutions for part in parts}
    if card.features is not None:
        for r in resolutions:
            found |= _vector_encodings(f"features_{r}", card.features["dtype"])
    return {**found, mds.CRC: mds.CRC_ENCODING}


def _vector_encodings(column: str, dtype: str) -> dict[str, str]:
    """Returns the MDS encodings of vectors in a dtype: in 8 bits there is a scale for each of them."""
    if dtype in EIGHT_BITS:
        return {column: "ndarray:uint8", f"{column}_scale": "ndarray:float32"}
    return {column: "ndarray:uint16" if dtype == "bfloat16" else f"ndarray:{dtype}"}


def bits_of(column: str, card: Card) -> torch.dtype | None:
    """Returns the dtype of the values whose bits a column holds as integers; None for other columns."""
    if column == "text":
        return EIGHT_BITS.get(card.text_dtype, torch.bfloat16)
    if card.features is not None and column.startswith("features_") and not column.endswith("_scale"):
        return EIGHT_BITS.get(card.features["dtype"])
    return None


def sample_bytes(
    resolutions: Iterable[int],
    channels: int,
    downsample: int,
    text_width: int,
    tokens: float,
    text_dtype: str = "bfloat16",
    posterior: str = "mean_std",
    feature_width: int = 0,
    feature_dtype: str = "float16",
) -> float:
    """Size of a stored sample in bytes: its latents, text and features, without key, caption and checksum.

    Args:
        resolutions: the sides in pixels of the square pictures that it holds.
        channels, downsample: the VAE's latent channels, and its pixels per latent pixel.
        text_width, tokens: the text encoder's width, and the number of the caption's tokens (a mean may be a fraction).
        text_dtype, posterior: as in the card.
        feature_width, feature_dtype: of the features; 0 for none.
    """

    def vector(width: int, dtype: str) -> int:
        return width + 4 if dtype in EIGHT_BITS else 2 * width  # 4: its scale

    kinds = 2 if posterior == "mean_std" else 1
    size = sum(2 * kinds * channels * (side // downsample) ** 2 for side in resolutions)
    size += sum((side // FEATURE_CELL) ** 2 for side in resolutions if feature_width) * vector(
        feature_width, feature_dtype
    )
    return size + tokens * vector(text_width, text_dtype)


def to_row(record: Record, card: Card) -> dict[str, Any]:
    """Returns a record in its stored form, still without its checksum."""
    row: dict[str, Any] = {
        "key": record.key,
        "caption": record.caption,
        "width": record.width,
        "height": record.height,
        **_vector_columns("text", record.text, card.text_dtype),
    }
    for resolution, latent in record.latents.items():
        row[f"latent_{resolution}_mean"] = latent.mean.half().numpy()
        if latent.std is not None:
            row[f"latent_{resolution}_std"] = latent.std.half().numpy()
    for resolution, features in record.features.items():
        assert card.features is not None
        row |= _vector_columns(f"features_{resolution}", features, card.features["dtype"])
    return row


def _vector_columns(column: str, vectors: Tensor, dtype: str) -> dict[str, np.ndarray]:
    """Returns the stored form of vectors, which the last dimension holds, in a dtype of `_vector_encodings`."""
    if dtype == "bfloat16":
        return {column: vectors.view(torch.uint16).numpy()}
    if dtype not in EIGHT_BITS:
        return {column: vectors.numpy()}
    largest = 127.0 if dtype == "int8" else torch.finfo(EIGHT_BITS[dtype]).max
    values = vectors.float()
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    scaled = values / scale
    bits = (scaled.round() if dtype == "int8" else scaled).to(EIGHT_BITS[dtype]).view(torch.uint8)
    return {column: bits.numpy(), f"{column}_scale": scale[..., 0].numpy()}


def stored_size(value: Any) -> int:
    """Returns the size of a stored value in bytes."""
    return value.nbytes if isinstance(value, np.ndarray | np.generic) else len(str(value).encode())


def text_of(row: dict[str, Any], dtype: str) -> Tensor:
    """Returns a stored row's text [L, E] in bf16; `dtype` is the card's `text_dtype`."""
    bits = _tensor(row["text"])
    return bits.view(torch.bfloat16) if dtype == "bfloat16" else _from_8_bits(row, "text", dtype).bfloat16()


def features_of(row: dict[str, Any], resolution: int, dtype: str) -> Tensor:
    """Returns a stored row's features [h, w, F] at a resolution in fp16; `dtype` is that of the card's `features`."""
    column = f"features_{resolution}"
    return _tensor(row[column]) if dtype == "float16" else _from_8_bits(row, column, dtype).half()


def _from_8_bits(row: dict[str, Any], column: str, dtype: str) -> Tensor:
    scale = torch.from_numpy(row[f"{column}_scale"].copy())
    return _tensor(row[column]).view(EIGHT_BITS[dtype]).float() * scale[..., None]


def latent_of(row: dict[str, Any], resolution: int) -> Latent:
    """Returns a stored row's latent at a resolution, in fp16 as stored."""
    mean, std = row[f"latent_{resolution}_mean"], row.get(f"latent_{resolution}_std")
    return Latent(_tensor(mean), None if std is None else _tensor(std))


def _tensor(stored: np.ndarray) -> Tensor:
    """Returns the same numbers as a tensor; copies read-only arrays, as torch warns of those."""
    return torch.from_numpy(stored if stored.flags.writeable else stored.copy())


def set_name(resolutions: Iterable[int], bucket: tuple[int, int] | None) -> str:
    """Returns the folder, within its source's, of samples with exactly these resolutions and this bucket."""
    shape = "" if bucket is None else f"_{bucket[0]}x{bucket[1]}"
    return "-".join(str(r) for r in sorted(resolutions)) + shape


# ---- files ----


def write_file(root: Path, name: str, content: str | bytes) -> Path:
    """Writes a small file of the data set by `atomic_write`; a killed writer leaves nothing outside work/. Returns its path."""
    path, work = root / name, root / WORK
    for folder in (path.parent, work):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content, temporary_folder=work)
    return path


# ---- the null text ----


def save_null_text(root: Path, text: Tensor) -> None:
    """Writes the encoded empty caption [L, E] beside the card."""
    write_file(root, NULL_TEXT, save({"text": text}))


def load_null_text(root: Path) -> Tensor:
    """Reads the encoded empty caption [L, E] in bf16. Raises FileNotFoundError where it is missing."""
    if not (root / NULL_TEXT).is_file():
        raise FileNotFoundError(f"{root / NULL_TEXT} is missing; run data_prep/encode.py on this data set again")
    return load_file(root / NULL_TEXT)["text"]
