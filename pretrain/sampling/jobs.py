"""Pictures to draw, and those that are there already: each picture says in its PNG what it was drawn with."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data_prep.common.files import atomic_write

CHUNK = "focusdit"  # the PNG's text chunk with the description


@dataclass(frozen=True)
class Job:
    """One picture to draw: its place in the list, its prompt and seed, and all settings that it depends on."""

    index: int
    prompt: str
    seed: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.index:06d}_{hashlib.sha256(self.prompt.encode()).hexdigest()[:8]}"

    @property
    def description(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "seed": self.seed, "settings": self.settings}

    def picture(self, out: Path) -> Path:
        return out / f"{self.name}.png"

    def masks(self, out: Path) -> Path:
        return out / f"{self.name}_masks.png"


def read_description(path: Path) -> dict[str, Any] | None:
    """The description in a picture's PNG; None where there is no picture, or a damaged one."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            description = json.loads(image.text[CHUNK])  # type: ignore[attr-defined]
    except (OSError, SyntaxError, KeyError, ValueError):  # absent, cut off, or not ours
        return None
    return description if isinstance(description, dict) and isinstance(description.get("settings"), dict) else None


def is_drawn(job: Job, out: Path, with_masks: bool) -> bool:
    """True where the job's picture, and its masks if wanted, are there."""
    wanted = [job.picture(out), *([job.masks(out)] if with_masks else [])]
    return all(read_description(path) == job.description for path in wanted)


def undrawn(jobs: Sequence[Job], out: Path, with_masks: bool, overwrite: bool) -> list[Job]:
    """The jobs without a picture. Raises ValueError where one of other settings is in its place, unless `overwrite`."""
    todo = []
    for job in jobs:
        there = read_description(job.picture(out))
        if there is not None and there != job.description and not overwrite:
            old, new = there["settings"], job.settings
            changed = [f"{k} {old.get(k)!r}, now {new.get(k)!r}" for k in {**new, **old} if old.get(k) != new.get(k)]
            changed += [f"seed {there.get('seed')}, now {job.seed}"] if there.get("seed") != job.seed else []
            raise ValueError(
                f"{job.picture(out)} was drawn with other settings ({'; '.join(changed)}): "
                "choose another --out, or replace it with --overwrite"
            )
        if not is_drawn(job, out, with_masks):
            todo.append(job)
    return todo


def write_png(image: Image.Image, path: Path, description: dict[str, Any] | None = None) -> None:
    """Writes a picture with its description, so that the file is either absent, old, or whole."""
    info = PngInfo()
    if description is not None:
        info.add_itxt(CHUNK, json.dumps(description))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    atomic_write(path, buffer.getvalue())
