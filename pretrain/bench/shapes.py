"""How far the shapes' checker is right: true pictures, damaged ones, and pictures that are wrong in one attribute.

Three tables: the accuracy of each task on true pictures, whole and damaged; the share of pictures that fail a task where one
attribute is wrong; and what is recognised (shapes, numbers, places) beside what was drawn. The strict measure stands beside it.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageFilter

from data_prep.encoders import Vae, pixels_to_floats
from data_prep.pictures.grids import to_image
from data_prep.shapes import COLOURS, MARGIN, PLACES, SHAPES, Scene, Shape, check, draw, random_scene, scenes
from data_prep.shapes_checker import TASKS, Seen, by_figure, compare, direction, place, recognise

SIDE = 256
ATTRIBUTES = {  # of each kind of scene, and the task that a wrong one fails
    "one": {"shape": "single_object", "number": "single_object", "colour": "colours", "position": "position"},
    "count": {"shape": "counting", "number": "counting", "colour": "colours"},
    "pair": {
        "shape": "two_objects",
        "number": "two_objects",
        "colour": "colour_attribution",
        "swapped colours": "colour_attribution",
        "position": "position",
    },
}
WORDS = {(0, 0): "centre", (0, -1): "up", (0, 1): "down", (-1, 0): "left", (1, 0): "right"}
Damage = Callable[[Image.Image, np.random.Generator], Image.Image]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=600, help="of each damage and of each wrong attribute")
    parser.add_argument("--seed", type=int, default=7)


def run(args: argparse.Namespace) -> str:
    """The tables, in Markdown."""
    true = list(scenes(args.pictures, args.seed))
    seen = {name: seen_of(true, damage) for name, damage in damages().items()}
    large = [draw(scene, 512) for scene in true[:100]]
    start = time.perf_counter()
    for picture in large:
        recognise(picture)
    each = (time.perf_counter() - start) / len(large)
    return "\n\n".join(
        [
            accuracy_table(true, seen),
            wrong_table(args.pictures, args.seed),
            *confusion(true, seen["ragged edges"]),
            f"{1000 * each:.1f} ms to recognise a picture of 512 px",
        ]
    )


# ---- pictures ----


def damages() -> dict[str, Damage]:
    """The damages that a picture of SIDE pixels is shown with, by name."""
    vae = Vae("tiny")

    def through_vae(noise: float) -> Damage:
        def apply(image: Image.Image, rng: np.random.Generator) -> Image.Image:
            latent = vae.encode(pixels_to_floats(torch.from_numpy(np.array(image)[None]), vae.device)).mean
            # Neighbouring latents are off together, as a model's are: every second one is drawn.
            field = rng.standard_normal((1, latent.shape[1], *(n // 2 for n in latent.shape[2:])), dtype=np.float32)
            off = torch.nn.functional.interpolate(torch.from_numpy(field), scale_factor=2, mode="bilinear")
            return to_image(vae.decode(latent + noise * off)[0])

        return apply

    return {
        "none": lambda image, rng: image,
        "JPEG of quality 30": _jpeg,
        "tiny VAE and back": through_vae(0.0),
        "noise, 50 levels": lambda image, rng: _levels(np.asarray(image) + 50 * rng.standard_normal((SIDE, SIDE, 3))),
        "blur of 4 px": lambda image, rng: image.filter(ImageFilter.GaussianBlur(4)),
        "ragged edges": _ragged,
        "noise in the latents": through_vae(0.4),
    }


def _jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def _levels(pixels_HW3: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels_HW3.round().clip(0, 255).astype(np.uint8))


def _ragged(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Every point is moved, by 4 px on average, together with its neighbours within 8 px; then edges are softened."""
    moved = []
    for _ in range(2):
        field = Image.fromarray(rng.standard_normal((SIDE // 8, SIDE // 8)).astype(np.float32))
        moved.append(5 * np.asarray(field.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    y, x = np.mgrid[:SIDE, :SIDE]
    places = [(axis + off).round().astype(int).clip(0, SIDE - 1) for axis, off in zip((y, x), moved, strict=True)]
    return Image.fromarray(np.asarray(image)[tuple(places)]).filter(ImageFilter.GaussianBlur(2))


def seen_of(true: Iterable[Scene], damage: Damage) -> list[tuple[Image.Image, Seen]]:
    """Each scene's picture with a damage, and what is seen in it."""
    rng = np.random.default_rng(0)
    pictures = [damage(draw(scene, SIDE), rng) for scene in true]
    return [(picture, recognise(picture)) for picture in pictures]


def wrong(scene: Scene, attribute: str, rng: random.Random) -> Scene | None:
    """The scene with one attribute changed; None where that is no change that a picture could show."""
    objects, changed = list(scene.objects), rng.randrange(len(scene.objects))
    other_colours = [c for c in COLOURS if c != scene.background and c not in scene.foreground]
    if attribute == "shape":
        objects[changed] = replace(
            objects[changed], shape=rng.choice([s for s in SHAPES if s != objects[changed].shape])
        )
    elif attribute == "colour":
        objects[changed] = replace(objects[changed], colour=rng.choice(other_colours))
    elif attribute == "swapped colours":
        if objects[0].shape == objects[1].shape:
            return None  # the same picture as with swapped places
        objects = [replace(o, colour=other.colour) for o, other in zip(objects, objects[::-1], strict=True)]
    elif attribute == "number":
        objects = _of_another_number(scene, rng)
    elif len(objects) == 2:
        objects = [replace(o, x=1 - o.x, y=1 - o.y) for o in objects]
    else:
        (o,) = objects
        room = 0.5 - MARGIN - o.radius
        moved = [replace(o, x=0.5 + room * x, y=0.5 + room * y) for x, y in PLACES.values()]
        objects = [rng.choice([other for other in moved if abs(other.x - o.x) + abs(other.y - o.y) > room / 2])]
    return replace(scene, objects=tuple(objects))


def _of_another_number(scene: Scene, rng: random.Random) -> list[Shape]:
    objects, fewer = list(scene.objects), rng.random() < 0.5
    if len(objects) == 1:  # two or three small ones
        o, counted = objects[0], random_scene(rng, "count").objects
        return [] if fewer else [replace(other, shape=o.shape, colour=o.colour) for other in counted]
    if fewer or len(objects) == 3:
        objects.pop(rng.randrange(len(objects)))
        return objects
    # Beside two, where there is room at any size of theirs.
    upright = objects[0].x == objects[1].x
    x, y = (0.14, 0.5) if upright else (0.5, 0.14)
    return [*objects, replace(objects[0], x=x, y=y, radius=0.11)]


# ---- tables ----


def accuracy(true: Iterable[Scene], seen: Iterable[Seen]) -> dict[str, float]:
    """The share of pictures that are right, by figure of the checker."""
    figures = by_figure(compare(found, scene).figures for scene, found in zip(true, seen, strict=True))
    return {name: sum(values) / len(values) for name, values in figures.items()}


def accuracy_table(true: list[Scene], seen: Mapping[str, list[tuple[Image.Image, Seen]]]) -> str:
    """A row for each damage."""
    columns = [*TASKS, "background", "sizes", "whole"]
    rows = []
    for name, entries in seen.items():
        found = accuracy(true, [what for _, what in entries])
        strict = [check(picture, scene) for (picture, _), scene in zip(entries, true, strict=True)]
        shapes = [verdict.shapes for verdict in strict if verdict.shapes is not None]
        more = [sum(verdict.colours for verdict in strict) / len(strict), sum(shapes) / len(shapes)]
        rows.append([name, *(f"{value:.3f}" for value in [*(found[c] for c in columns), *more])])
    return table(["true pictures, damaged by", *columns, "strict colours", "strict shapes"], rows)


def failed(kind: str, attribute: str, pictures: int, seed: int) -> dict[str, float]:
    """The share of pictures that fail each task, where one attribute of their scene is wrong."""
    rng, fails, count = random.Random(f"{seed}/{kind}/{attribute}"), Counter[str](), 0
    while count < pictures:
        scene = random_scene(rng, kind)
        changed = wrong(scene, attribute, rng)
        if changed is None:
            continue
        count += 1
        tasks = compare(recognise(draw(changed, SIDE)), scene).tasks
        fails.update({task: not fulfilled for task, fulfilled in tasks.items()})
    return {task: fails[task] / count for task in TASKS if task in fails}


def wrong_table(pictures: int, seed: int) -> str:
    """A row for each kind of scene and wrong attribute; the task that must fail is in bold."""
    rows = []
    for kind, attributes in ATTRIBUTES.items():
        for attribute, fails in attributes.items():
            shares = failed(kind, attribute, pictures, seed)
            cells = [f"{shares[task]:.3f}" if task in shares else "" for task in TASKS]
            cells = [f"**{cell}**" if task == fails else cell for cell, task in zip(cells, TASKS, strict=True)]
            rows.append([kind, attribute, *cells])
    return table(["kind", "wrong", *TASKS], rows)


def confusion(true: Iterable[Scene], seen: Iterable[tuple[Image.Image, Seen]]) -> list[str]:
    """Tables of what is seen (columns) beside what was drawn (rows): shapes, numbers, places, directions of pairs."""
    counts: defaultdict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for scene, (_, what) in zip(true, seen, strict=True):
        counts["number"][str(len(scene.objects)), str(len(what.objects))] += 1
        for o in scene.objects:
            there = [other for other in what.objects if abs(other.x - o.x) + abs(other.y - o.y) < o.radius]
            counts["shape"][o.shape, there[0].shape if there else "nothing"] += 1
        if len(scene.objects) == 1 and what.objects:
            counts["place"][WORDS[place(scene.objects[0])], WORDS[place(what.objects[0])]] += 1
        if len(scene.foreground) == 2 and len(what.objects) == 2:
            first = min(what.objects, key=lambda other: other.colour != scene.objects[0].colour)
            second = next(other for other in what.objects if other is not first)
            counts["direction"][WORDS[direction(*scene.objects)], WORDS[direction(first, second)]] += 1
    tables = []
    for name, cells in counts.items():
        columns = sorted({column for _, column in cells})
        rows = sorted({row for row, _ in cells})
        tables.append(table([name, *columns], [[row, *(str(cells[row, c] or "") for c in columns)] for row in rows]))
    return tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
