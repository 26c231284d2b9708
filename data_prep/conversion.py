"""A data set in other formats: webdataset tars or Parquet files, one for each MDS shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset
from safetensors.torch import save
from torch import Tensor

from data_prep import schema
from data_prep.checks.damage import Files
from data_prep.common import mds
from data_prep.common.files import temporary_name
from data_prep.common.progress import Progress

ABOUT = ("key", "caption", "width", "height")
Row = dict[str, Any]


def tensors_of(row: Row, card: schema.Card) -> dict[str, Tensor]:
    """A stored row's tensors by column: text, latents, and features if it has any, in the card's precision, with their scales."""
    tensors = {name: torch.from_numpy(value.copy()) for name, value in row.items() if name not in (*ABOUT, mds.CRC)}
    return {name: values.view(schema.bits_of(name, card) or values.dtype) for name, values in tensors.items()}


def rows_of(files: Files, card: schema.Card, folder: str, shard: dict[str, Any]) -> Iterator[Row]:
    """The rows of an MDS shard. Raises ValueError with the shard's name where it is damaged."""
    stored = shard["zip_data"] or shard["raw_data"]
    name = f"{folder}/{stored['basename']}"
    try:
        data = mds.decompressed(files.read(name, keep=False), shard)
        for row in mds.decode_rows(data, shard, schema.columns(card.sets[folder]["resolutions"], card)):
            yield {**{k: row[k] for k in ABOUT}, "tensors": save(tensors_of(row, card))}
    except ValueError as error:
        raise ValueError(f"{name} {error}; make it again with data_prep/verify.py {files.data} --repair") from error


def write_tar(rows: Iterable[Row], to: Path) -> None:
    """Writes members `000000.json` and `000000.safetensors` for each row."""
    with webdataset.TarWriter(str(to), mtime=0) as tar:
        for number, row in enumerate(rows):
            about = {name: row[name] for name in ABOUT}
            tar.write({"__key__": f"{number:06d}", "json": about, "safetensors": row["tensors"]})


def write_parquet(rows: Iterable[Row], to: Path) -> None:
    """Writes columns key, caption, width, height and tensors."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {
        "key": pa.string(),
        "caption": pa.string(),
        "width": pa.int64(),
        "height": pa.int64(),
        "tensors": pa.binary(),
    }
    parquet.write_table(pa.Table.from_pylist(list(rows), schema=pa.schema(kinds)), to)


WRITERS: dict[str, tuple[str, Callable[[Iterable[Row], Path], None]]] = {
    "webdataset": ("tar", write_tar),
    "parquet": ("parquet", write_parquet),
}


def convert(files: Files, out: Path, to: str) -> tuple[int, int]:
    """Converts all sets; returns the number of samples and of files.

    Raises:
        ValueError, OSError: there is no finished data set, a shard is damaged, or `out` holds another data set.
    """
    files.list_files()
    if schema.CARD not in files.sizes:
        raise ValueError(f"{files.data} is no data set: it has no {schema.CARD}")
    card_bytes = files.read(schema.CARD)
    card = schema.Card.load(files.root)
    if not card.complete:
        raise ValueError(f"{files.data} is not finished: run data_prep/encode.py on it again")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not ((out / schema.CARD).is_file() and (out / schema.CARD).read_bytes() == card_bytes):
        raise ValueError(f"{out} is not empty and holds no conversion of this data set; choose another --output")
    (out / schema.CARD).write_bytes(card_bytes)
    (out / schema.NULL_TEXT).write_bytes(files.read(schema.NULL_TEXT))
    shards = [(folder, shard) for folder in card.sets for shard in files.json(f"{folder}/{schema.INDEX}")["shards"]]
    ending, write = WRITERS[to]
    with Progress(len(shards), "shard") as progress:
        for folder, shard in shards:
            target = target_of(out, folder, shard, ending)
            if not target.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                writing = target.with_name(temporary_name(target.name))
                try:
                    write(rows_of(files, card, folder, shard), writing)
                    writing.replace(target)
                finally:
                    writing.unlink(missing_ok=True)
            progress.update()
    return sum(shard["samples"] for _, shard in shards), len(shards)


def target_of(out: Path, folder: str, shard: dict[str, Any], ending: str) -> Path:
    """The file that a shard becomes: `PART/shard.00003.mds` of a set to `PART-00003.tar`."""
    part, _, name = shard["raw_data"]["basename"].rpartition("/")
    number = name.removeprefix("shard.").removesuffix(".mds")
    target = out / folder / f"{part}-{number}.{ending}"
    if target.parent.resolve() != (out / folder).resolve() or not number.isdigit():
        raise ValueError(
            f"{folder}/{schema.INDEX} names {shard['raw_data']['basename']}: not made by data_prep/encode.py"
        )
    return target
