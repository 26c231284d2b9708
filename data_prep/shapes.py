"""Captioned shapes: pictures whose captions are true by construction, and a checker that recognises what they show.

    scene ── caption()  "a small red circle above a large blue square on a yellow background"
      │
      ├──── draw()      the picture, at any size
      │
      ├──── check()     which colours and shapes a picture shows: the measure of the demo and of the tests
      │
      └──── edge_distance()   how far its edges lie from where the scene has them

`write_tars` draws many scenes into webdataset tars as img2dataset writes them (`key.jpg`, `key.txt`, `key.json`).
Everything follows from a seed. The command line:

    python data_prep/shapes.py --output tars --pictures 2000 --seed 0
"""

from __future__ import annotations

import io
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from data_prep.common.command import command_parser
from data_prep.common.paths import path

if TYPE_CHECKING:
    import webdataset

COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 70),
    "blue": (40, 80, 215),
    "yellow": (247, 205, 45),
    "purple": (150, 60, 190),
    "cyan": (70, 205, 220),
    "white": (243, 243, 243),
    "black": (22, 22, 22),
}
SHAPES = ("circle", "square", "triangle")
# Half an object's extent, as a share of the picture's side; objects of a pair are smaller.
RADII = {"one": {"small": 0.23, "large": 0.36}, "count": {"small": 0.19}, "pair": {"small": 0.15, "large": 0.22}}
COUNTS = {2: "two", 3: "three"}
PLACES = {  # direction (x, y) from the centre to an edge, at a distance of MARGIN
    "in the centre": (0.0, 0.0),
    "at the top": (0.0, -1.0),
    "at the bottom": (0.0, 1.0),
    "on the left": (-1.0, 0.0),
    "on the right": (1.0, 0.0),
}
MARGIN = 0.03
RELATIONS = {  # direction (x, y) from the second object to the first
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
    "left of": (-1.0, 0.0),
    "right of": (1.0, 0.0),
}
KINDS = tuple(RADII)
# An object's area as a share of its bounding box, by which `check` tells the shapes apart.
_FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}
# An object's outline in radii.
_OUTLINE = {"circle": 2 * np.pi, "square": 8.0, "triangle": 2 + 2 * 5**0.5}
_SUPERSAMPLING = 2
_LEAST_AREA = (
    0.01  # a colour that covers a smaller share of the picture is no object; the smallest triangle covers 0.045
)


@dataclass(frozen=True)
class Shape:
    """Object of a scene: its centre (x, y) and half its extent are shares of the picture's side, y downwards."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Content of a picture. `phrase` is the caption without the background."""

    objects: tuple[Shape, ...]
    background: str
    phrase: str

    @property
    def caption(self) -> str:
        """The whole caption."""
        return f"{self.phrase} on a {self.background} background"

    @property
    def foreground(self) -> frozenset[str]:
        """Colours of the objects."""
        return frozenset(o.colour for o in self.objects)


@dataclass(frozen=True)
class CheckResult:
    """Outcome of comparing a picture with its scene's colours and shapes; `shapes` is None with several objects of one colour."""

    background: bool
    foreground: bool
    shapes: bool | None

    @property
    def colours(self) -> bool:
        """True where background and objects both have the scene's colours."""
        return self.background and self.foreground


def random_scene(rng: random.Random, kind: str | None = None) -> Scene:
    """Draws a scene of `kind` ("one", "count" or "pair"; None: any)."""
    kind = kind or rng.choice(KINDS)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of scene {kind!r}; the kinds are {', '.join(KINDS)}")
    background, first, second = rng.sample(list(COLOURS), 3)
    radii = RADII[kind]
    words = {"background": background, "colour": first, "shape": rng.choice(SHAPES), "size": rng.choice(list(radii))}
    if kind == "one":
        words["place"] = rng.choice(list(PLACES))
    elif kind == "count":
        words["number"] = COUNTS[rng.choice(list(COUNTS))]
    else:
        words["relation"] = rng.choice(list(RELATIONS))
        words |= {"other_colour": second, "other_shape": rng.choice(SHAPES), "other_size": rng.choice(list(radii))}
    return _scene(kind, words)


def _scene(kind: str, words: Mapping[str, str]) -> Scene:
    """The scene of a kind that has these words in its caption."""
    shape, colour, size, background = (words[name] for name in ("shape", "colour", "size", "background"))
    radii = RADII[kind]
    if kind == "one":
        x, y = (0.5 + (0.5 - MARGIN - radii[size]) * towards for towards in PLACES[words["place"]])
        return Scene(
            (Shape(shape, colour, x, y, radii[size]),), background, f"a {size} {colour} {shape} {words['place']}"
        )
    if kind == "count":
        number = {word: n for n, word in COUNTS.items()}[words["number"]]
        centres = [(0.26, 0.26), (0.74, 0.26), (0.5, 0.74)] if number == 3 else [(0.26, 0.5), (0.74, 0.5)]
        objects = tuple(Shape(shape, colour, x, y, radii[size]) for x, y in centres)
        return Scene(objects, background, f"{COUNTS[number]} {size} {colour} {shape}s")
    dx, dy = (0.25 * side for side in RELATIONS[words["relation"]])
    other = Shape(words["other_shape"], words["other_colour"], 0.5 - dx, 0.5 - dy, radii[words["other_size"]])
    objects = (Shape(shape, colour, 0.5 + dx, 0.5 + dy, radii[size]), other)
    phrase = f"a {size} {colour} {shape} {words['relation']} a {words['other_size']} {other.colour} {other.shape}"
    return Scene(objects, background, phrase)


_WORD = {"size": "small|large", "colour": "|".join(COLOURS), "shape": "|".join(SHAPES)}
_OBJECT = r"a (?P<{0}size>{size}) (?P<{0}colour>{colour}) (?P<{0}shape>{shape})"
_CAPTIONS = {
    "one": _OBJECT.format("", **_WORD) + f" (?P<place>{'|'.join(PLACES)})",
    "count": r"(?P<number>{}) (?P<size>{size}) (?P<colour>{colour}) (?P<shape>{shape})s".format(
        "|".join(COUNTS.values()), **_WORD
    ),
    "pair": f"{_OBJECT.format('', **_WORD)} (?P<relation>{'|'.join(RELATIONS)}) {_OBJECT.format('other_', **_WORD)}",
}


def scene_of(caption: str) -> Scene:
    """The scene of a caption. Raises ValueError for words that no scene has."""
    for kind, pattern in _CAPTIONS.items():
        if found := re.fullmatch(f"{pattern} on a (?P<background>{_WORD['colour']}) background", caption):
            return _scene(kind, found.groupdict())
    raise ValueError(
        f"no caption of a scene of shapes: {caption!r}; such as {random_scene(random.Random(0)).caption!r}"
    )


def draw(scene: Scene, side: int = 512) -> Image.Image:
    """Draws the scene as a square RGB picture of `side` pixels."""
    full = side * _SUPERSAMPLING
    image = Image.new("RGB", (full, full), COLOURS[scene.background])
    canvas = ImageDraw.Draw(image)
    for o in scene.objects:
        x, y, r = o.x * full, o.y * full, o.radius * full
        box = (x - r, y - r, x + r, y + r)
        if o.shape == "circle":
            canvas.ellipse(box, fill=COLOURS[o.colour])
        elif o.shape == "square":
            canvas.rectangle(box, fill=COLOURS[o.colour])
        else:
            canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=COLOURS[o.colour])
    return image.resize((side, side), Image.Resampling.BOX)


def check(image: Image.Image, scene: Scene) -> CheckResult:
    """Recognises a picture's colours and shapes and compares them with the scene's.

    Background: the most frequent palette colour of the outer frame. Foreground: the other palette colours that cover at
    least 1% of the picture, edges left out, must be exactly the scene's. Shapes: by the filled share of each colour's
    bounding box.
    """
    labels, solid = _palette_labels(image)
    names = list(COLOURS)
    edge = max(1, len(labels) // 20)
    sides = (labels[:edge], labels[-edge:], labels[:, :edge], labels[:, -edge:])
    frame = np.concatenate([side.ravel() for side in sides])
    background = names[np.bincount(frame, minlength=len(names)).argmax()]
    areas = np.bincount(labels[solid], minlength=len(names)) / labels.size
    found = frozenset(n for n, area in zip(names, areas, strict=True) if n != background and area >= _LEAST_AREA)
    shapes = None
    if len(scene.foreground) == len(scene.objects):
        shapes = all(
            o.colour in found and _shape_of((labels == names.index(o.colour)) & solid) == o.shape for o in scene.objects
        )
    return CheckResult(background == scene.background, found == scene.foreground, shapes)


def edge_distance(image: Image.Image, scene: Scene) -> float:
    """Mean distance of the objects' edges from where the scene has them, as a share of the square picture's side.

    It is the area of another nearest palette colour than the scene's own picture has, by the length of all outlines. So a wrong
    colour or an object that is not there counts with its whole area.
    """
    side = image.width
    wrong = _nearest_colours(image) != _nearest_colours(draw(scene, side))
    return float(wrong.mean()) / sum(_OUTLINE[o.shape] * o.radius for o in scene.objects)


def _palette_labels(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest palette colour of each pixel [S, S], S = 128, and where all 3×3 neighbours have the same."""
    labels = _nearest_colours(image.resize((128, 128), Image.Resampling.BOX))
    padded = np.pad(labels, 1, mode="edge")
    side = len(labels)
    solid = np.ones_like(labels, dtype=bool)
    for dy in range(3):
        for dx in range(3):
            solid &= padded[dy : dy + side, dx : dx + side] == labels
    return labels, solid


def _nearest_colours(image: Image.Image) -> np.ndarray:
    """Returns the number of the nearest palette colour of each pixel [H, W]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    return ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)


def _shape_of(mask: np.ndarray) -> str:
    """Returns the shape with the nearest share of its bounding box; rows of a single pixel do not count."""
    rows, columns = np.flatnonzero(mask.sum(1) > 1), np.flatnonzero(mask.sum(0) > 1)
    if len(rows) == 0 or len(columns) == 0:
        return "nothing"
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return min(_FILL, key=lambda name: abs(_FILL[name] - box.mean()))


def scenes(count: int, seed: int, kinds: Sequence[str] = KINDS) -> Iterator[Scene]:
    """Yields `count` scenes of these kinds in turn, the same for the same seed. Raises ValueError for an unknown kind."""
    for i in range(count):
        yield random_scene(random.Random(f"{seed}/{i}"), kinds[i % len(kinds)])


def tar_of(path: Path) -> webdataset.TarWriter:
    """Opens a writer of a tar whose bytes depend on the samples alone: time, owner and mode are fixed."""
    import webdataset  # late: it imports torch

    return webdataset.TarWriter(str(path), mtime=0, user="shapes", group="shapes")


def write_tars(
    folder: Path,
    pictures: int,
    seed: int = 0,
    per_tar: int = 250,
    small_share: float = 0.5,
    kinds: Sequence[str] = KINDS,
) -> list[Path]:
    """Writes `pictures` scenes, of `kinds` in turn, as JPEGs with captions into `folder/00000.tar`, …; returns the tars' paths.

    `small_share` of them are 320 px wide, and serve 256 px training only; the others are 512 px wide.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:05d}.tar" for i in range(-(-pictures // per_tar))]
    todo = enumerate(scenes(pictures, seed, kinds))
    for tar_path in paths:
        with tar_of(tar_path) as tar:
            for i, scene in (entry for _, entry in zip(range(per_tar), todo, strict=False)):
                side = 320 if random.Random(f"{seed}/{i}/side").random() < small_share else 512
                jpeg = io.BytesIO()
                draw(scene, side).save(jpeg, "JPEG", quality=95, subsampling=0)
                about = {"caption": scene.caption, "width": side, "height": side, "status": "success"}
                tar.write(
                    {
                        "__key__": f"{i:09d}",
                        "jpg": jpeg.getvalue(),
                        "txt": scene.caption,
                        "json": json.dumps(about).encode(),
                    }
                )
    return paths


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = command_parser("Draws captioned shapes into webdataset tars.")
    parser.add_argument("--output", type=path, required=True, help="folder for the tars")
    parser.add_argument("--pictures", type=int, default=2000, help="number of pictures")
    parser.add_argument("--per-tar", type=int, default=250, help="number of pictures in a tar")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    parser.add_argument(
        "--small-share", type=float, default=0.5, help="share of pictures of 320 px, which serve 256 px training only"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help=f"kinds of scenes, drawn in turn, of {', '.join(KINDS)}; one named twice comes twice as often (default: all)",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.small_share <= 1:
        parser.error(f"--small-share must be between 0 and 1, not {args.small_share:g}")
    for tar in write_tars(args.output, args.pictures, args.seed, args.per_tar, args.small_share, args.kinds):
        print(tar)
    return 0


if __name__ == "__main__":
    sys.exit(main())
