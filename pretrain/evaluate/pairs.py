"""Pairs of pictures for judging side by side: two folders' pictures of the same prompts, their order and their sides.

    prompts.jsonl of A and B ── match()  by prompt and seed, then by prompt alone
                                  │
                              arrange()  order and sides by a seed: A is on the left in half of the pairs

A page of pairs has an id that depends on its pictures, prompts, order, question and size, so that votes are counted with
the pictures they were given for, and with no others.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from pydantic import BaseModel, ValidationError

LIST = "prompts.jsonl"  # written by pretrain.sample


class _Line(BaseModel):
    file: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Drawn:
    """A picture of a folder: its path, what it was drawn from, its size (width, height), and the SHA-256 of its pixels."""

    path: Path
    prompt: str
    seed: int
    size: tuple[int, int]
    digest: str


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt."""

    a: Drawn
    b: Drawn

    @property
    def id(self) -> str:
        """Name of the pair that says nothing of which picture is whose."""
        content = json.dumps([self.a.prompt, self.a.seed, self.b.seed, self.a.digest, self.b.digest])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Matched:
    """What two folders have in common: pairs of different pictures, the number of equal ones, and pictures without partner."""

    pairs: list[Pair]
    equal: int
    without: list[Drawn]


@dataclass(frozen=True)
class Placed:
    """A pair as the page shows it."""

    pair: Pair
    a_is_left: bool

    @property
    def left(self) -> Drawn:
        """The picture on the left."""
        return self.pair.a if self.a_is_left else self.pair.b

    @property
    def right(self) -> Drawn:
        """The picture on the right."""
        return self.pair.b if self.a_is_left else self.pair.a


def opened(path: Path) -> Image.Image:
    """A picture's pixels in RGB. Raises ValueError for a file that is none, or is cut off."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as a picture ({reason}); delete it and sample again") from error


def read_folder(folder: Path) -> list[Drawn]:
    """The pictures of a folder that `pretrain.sample` made.

    Raises:
        FileNotFoundError: no folder, no list in it, or a picture of the list is missing.
        ValueError: a line of the list or a picture cannot be read.
    """
    listed = folder / LIST
    if not listed.is_file():
        raise FileNotFoundError(f"{listed} is not there: give a folder that python -m pretrain.sample has finished")
    lines = []
    for number, text in enumerate(listed.read_bytes().splitlines(), start=1):
        try:
            lines.append(_Line.model_validate_json(text))
        except ValidationError as error:
            what = error.errors()[0]
            field = ".".join(str(part) for part in what["loc"])
            raise ValueError(
                f"{listed}, line {number}: {field + ': ' if field else ''}{what['msg']}; sample again"
            ) from error
    missing = [line.file for line in lines if not (folder / line.file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of the {len(lines)} pictures in {LIST} are not there, the first is {missing[0]}; "
            "sample again"
        )
    return [_drawn(folder / line.file, line) for line in lines]


def _drawn(path: Path, line: _Line) -> Drawn:
    image = opened(path)
    digest = hashlib.sha256(f"{image.size} ".encode() + image.tobytes()).hexdigest()
    return Drawn(path, line.prompt, line.seed, image.size, digest)


def match(a: Sequence[Drawn], b: Sequence[Drawn]) -> Matched:
    """Pairs the pictures of A and B: first those of the same prompt and seed, then what is left of a prompt in order of seeds."""
    pairs: list[Pair] = []
    left_a, left_b = list(a), list(b)
    for same_seed in (True, False):
        partners: dict[tuple[str, int | None], list[Drawn]] = {}
        for drawn in sorted(left_b, key=lambda d: d.seed):
            partners.setdefault((drawn.prompt, drawn.seed if same_seed else None), []).append(drawn)
        alone = []
        for drawn in sorted(left_a, key=lambda d: d.seed):
            found = partners.get((drawn.prompt, drawn.seed if same_seed else None))
            if found:
                pairs.append(Pair(drawn, found.pop(0)))
            else:
                alone.append(drawn)
        left_a, left_b = alone, [drawn for rest in partners.values() for drawn in rest]
    different = [pair for pair in pairs if pair.a.digest != pair.b.digest]
    return Matched(different, len(pairs) - len(different), left_a + left_b)


def match_folders(a: Path, b: Path) -> Matched:
    """The pairs of two folders. Raises ValueError where there are none; else as `read_folder`."""
    matched = match(read_folder(a), read_folder(b))
    if not matched.pairs and matched.equal:
        raise ValueError(f"{a} and {b} hold the same pictures ({matched.equal} pairs, all equal): nothing to judge")
    if not matched.pairs:
        raise ValueError(f"no prompt is both in {a / LIST} and in {b / LIST}: sample both from one file of prompts")
    return matched


def arrange(pairs: Sequence[Pair], seed: int, count: int) -> list[Placed]:
    """The first `count` pairs of a shuffled order, with A on the left in half of them; all follows from the seed."""
    rng = random.Random(f"pairwise/{seed}")
    chosen = rng.sample(sorted(pairs, key=lambda pair: pair.id), count)
    sides = [i % 2 == 0 for i in range(count)]
    rng.shuffle(sides)
    if count % 2 and rng.random() < 0.5:  # of an odd number the one more is on either side
        sides = [not side for side in sides]
    return [Placed(pair, side) for pair, side in zip(chosen, sides, strict=True)]


def page_id(placed: Sequence[Placed], question: str, seed: int, side: int | None) -> str:
    """Name of a page by its content."""
    content = json.dumps([question, seed, side, [p.pair.id for p in placed]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
