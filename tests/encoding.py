"""Helpers of data prep's tests: tars of pictures, the encode command, and what a data set then holds."""

from __future__ import annotations

import io
import json
from pathlib import Path

from streaming import StreamingDataset

from data_prep import schema
from data_prep.encode import main
from data_prep.shapes import draw, scenes, tar_of


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
