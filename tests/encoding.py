"""Helpers of data prep's tests: tars of pictures, the encode command, and what a data set then holds."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from streaming import StreamingDataset

from data_prep import schema
from data_prep.encode import main
from data_prep.shapes import draw, scenes, tar_of
from data_prep.worker.parts import PartWriter


def jpeg(width: int, height: int, seed: int = 0, quality: int = 95) -> bytes:
    """A scene as a JPEG of any size."""
    out = io.BytesIO()
    draw(next(scenes(1, seed)), 512).resize((width, height)).save(out, "JPEG", quality=quality)
    return out.getvalue()


def write_pictures(path: Path, samples: dict[str, tuple[bytes, dict]]) -> Path:
    """A tar of pictures, by their keys, with the fields of their key.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tar_of(path) as tar:
        for key, (picture, fields) in samples.items():
            tar.write({"__key__": key, "jpg": picture, "json": json.dumps(fields).encode()})
    return path


def encode(output: Path, *options: str) -> int:
    """Runs the encode command with the tiny encoders at 64 px; later options win."""
    return main(["--output", str(output), "--encoders", "tiny", "--decoders", "1", "--resolutions", "64", *options])


def rows(root: Path) -> dict[str, dict]:
    """All samples of a data set by key."""
    card = schema.Card.load(root)
    sets = [StreamingDataset(local=str(root / name), batch_size=1) for name in card.sets]
    return {row["key"]: row for one in sets for row in one}


def report(root: Path) -> dict:
    """A data set's report.json."""
    return json.loads((root / "report.json").read_text())


CARD = schema.Card(
    {"name": "tiny", "width": 16}, {"name": "tiny", "channels": 4, "downsample": 8}, 300, "mean_std", [64]
)


def write_part(root: Path, name: str, count: int, token: str = "token") -> None:
    """A part of random samples that follow from its name."""
    generator = torch.Generator().manual_seed(len(name) + count)
    with PartWriter(root, name, CARD, token) as part:
        for number in range(count):
            latent = schema.Latent(*torch.rand(2, 4, 8, 8, generator=generator))
            text = torch.randn(3, 16, generator=generator).bfloat16()
            part.write(schema.Record(f"{name}/{number}", "caption", text, {64: latent}, 64, 64))
        stored = part.finish()
        part.commit({"sets": part.sets, "written": part.written, "stored_bytes": stored}, [{"key": "x", "reason": "é"}])
