"""The checker of captioned shapes: which objects a picture shows, and which of GenEval's six tasks they fulfil.

    picture ── recognise()  background and objects: shape, colour, place, size
                   │
    scene ───── judge()     single object, two objects, counting, colours, position, colour attribution

It is made for pictures by small models, whose edges are ragged and soft. An object is an area of one palette colour that is
left when its margin is taken off; its shape is told by moments, which single pixels change little. `shapes.check` is the strict
measure, by the share of the bounding box that is filled, which one pixel far out changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image

from data_prep.shapes import COLOURS, MARGIN, RADII, Scene, Shape

TASKS = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")
UNKNOWN = "unknown"  # the shape of an object that is none of them

_SIDE = 128  # pixels of the picture that is looked at
_WINDOW = 5  # pixels of the majority filter, and of the margin that is taken off on both sides together
_LEAST_AREA = 0.008  # of the picture, without the margin; the smallest true object, a triangle, has 0.027
_LEAST_SHARE = 0.1  # of the largest object's area
_LEAST_FIT = 0.7  # intersection over union with the ideal shape of this area and centre
# Moments about the centre in units of the spreads: how much wider it is below, E[x²y], 0 but for the triangle's 0.57; and how
# much of it is far off in both directions, E[x²y²], the circle's 0.67, the square's 1. The limits are about half-way.
_TAPER, _CORNERS = 0.25, 5 / 6

_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
_NAMES = list(COLOURS)


@dataclass(frozen=True)
class Seen:
    """What a picture shows.

    Attributes:
        objects: the largest first; a shape may be `UNKNOWN`.
    """

    background: str
    objects: tuple[Shape, ...]


@dataclass(frozen=True)
class Verdict:
    """How far a picture is what its caption says.

    Attributes:
        tasks: those of GenEval's tasks that the caption sets, and whether each is fulfilled.
        background: whether it has the colour.
        sizes: whether each object has its size.
    """

    tasks: Mapping[str, bool]
    background: bool
    sizes: bool

    @property
    def figures(self) -> dict[str, bool]:
        """Tasks, background and sizes; and `whole`, that all of them are right."""
        parts = {**self.tasks, "background": self.background, "sizes": self.sizes}
        return {**parts, "whole": all(parts.values())}


def by_figure(verdicts: Iterable[Mapping[str, bool]]) -> dict[str, list[bool]]:
    """The verdicts of many pictures by figure, tasks first; a task that no caption sets is left out."""
    entries = list(verdicts)
    names = dict.fromkeys([*TASKS, *(name for entry in entries for name in entry)])
    found = {name: [entry[name] for entry in entries if name in entry] for name in names}
    return {name: values for name, values in found.items() if values}


def mean_of_tasks(figures: Mapping[str, Sequence[bool]]) -> float:
    """GenEval's overall score: the mean over tasks of the share of pictures that fulfil it."""
    shares = [sum(figures[task]) / len(figures[task]) for task in TASKS if task in figures]
    return sum(shares) / len(shares)


def recognise(image: Image.Image) -> Seen:
    """The background and the objects of a picture."""
    small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32).reshape(-1, 3)
    labels = _labels(pixels, np.ones(len(_NAMES), dtype=bool))
    core = _core(labels)
    # Soft edges have mixed colours, which may be nearest to a third: only those that cover an area take part.
    areas = np.bincount(labels[core], minlength=len(_NAMES))
    present = areas >= _LEAST_AREA * labels.size
    if not present.any():  # noise alone
        return Seen(_NAMES[int(np.bincount(labels.ravel()).argmax())], ())
    labels = _labels(pixels, present)
    edge = _SIDE // 20
    sides = (labels[:edge], labels[-edge:], labels[:, :edge], labels[:, -edge:])
    background = int(np.bincount(np.concatenate([s.ravel() for s in sides])).argmax())
    core = _core(labels) & (labels != background)
    masks = []
    for part in _components(np.where(core, labels, -1)):
        if part.sum() >= _LEAST_AREA * labels.size:
            colour = int(labels[part][0])
            masks.append((colour, _filled((_box_sum(part) > 0) & (labels == colour))))
    masks.sort(key=lambda entry: -int(entry[1].sum()))
    large = [(c, mask) for c, mask in masks if mask.sum() >= _LEAST_SHARE * masks[0][1].sum()]
    return Seen(_NAMES[background], tuple(_recognised(mask, _NAMES[c]) for c, mask in large))


def judge(image: Image.Image, scene: Scene) -> Verdict:
    """Compares what a picture shows with its scene."""
    return compare(recognise(image), scene)


def compare(seen: Seen, scene: Scene) -> Verdict:
    """Compares what was seen with a scene.

    Which object is which is told by shapes and colours together, by shapes where they disagree (GenEval's detector knows the
    class alone). Objects beside the caption's fail the tasks of number: single object, two objects, counting.
    """
    asked = scene.objects
    kind = "one" if len(asked) == 1 else "count" if len(scene.foreground) == 1 else "pair"
    found = seen.objects if kind == "count" else _matched(seen.objects, asked)
    number = len(seen.objects) == len(asked) and sorted(o.shape for o in found) == sorted(o.shape for o in asked)
    pairs = list(zip(found, asked, strict=False))
    colours = len(pairs) == len(asked) and all(o.colour == a.colour for o, a in pairs)
    if kind == "one":
        position = bool(found) and place(found[0]) == place(asked[0])
        tasks = {"single_object": number, "colours": colours, "position": position}
    elif kind == "count":
        tasks = {"counting": number, "colours": bool(found) and {o.colour for o in found} == scene.foreground}
    else:
        position = len(found) == 2 and direction(*found) == direction(*asked)
        tasks = {"two_objects": number, "position": position, "colour_attribution": colours}
    sizes = len(pairs) == len(asked) and all(_size(o, kind) == _size(a, kind) for o, a in pairs)
    return Verdict(tasks, seen.background == scene.background, sizes)


def _matched(seen: Sequence[Shape], asked: Sequence[Shape]) -> tuple[Shape, ...]:
    """As many of the objects as are asked for, in that order: those that are most like them; () if too few."""

    def likeness(some: tuple[Shape, ...]) -> tuple[int, int]:
        shapes = sum(o.shape == a.shape for o, a in zip(some, asked, strict=True))
        colours = sum(o.colour == a.colour for o, a in zip(some, asked, strict=True))
        return shapes + colours, shapes

    return max(permutations(seen, len(asked)), key=likeness, default=())


def place(o: Shape) -> tuple[int, int]:
    """Where an object stands in the picture: the direction from the centre, (0, 0) or towards one of the four edges."""
    dx, dy = o.x - 0.5, o.y - 0.5
    room = max(0.5 - MARGIN - o.radius, 0.05)
    return (0, 0) if max(abs(dx), abs(dy)) < room / 2 else _axis(dx, dy)


def direction(first: Shape, second: Shape) -> tuple[int, int]:
    """The direction from the second object to the first, along one axis."""
    return _axis(first.x - second.x, first.y - second.y)


def _axis(dx: float, dy: float) -> tuple[int, int]:
    return (int(np.sign(dx)), 0) if abs(dx) > abs(dy) else (0, int(np.sign(dy)))


def _size(o: Shape, kind: str) -> str:
    return min(RADII[kind], key=lambda size: abs(RADII[kind][size] - o.radius))


# ---- areas of one colour ----


def _labels(pixels: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The nearest of the present colours [S, S] for pixels [S·S, 3], each pixel by the majority of its window."""
    colours = np.flatnonzero(present)
    palette = _PALETTE[colours]
    nearest = ((palette**2).sum(1) - 2 * pixels @ palette.T).argmin(1).reshape(_SIDE, _SIDE)
    votes = _box_sum(nearest[None] == np.arange(len(colours))[:, None, None])
    return np.asarray(colours[votes.argmax(0)])


def _core(labels: np.ndarray) -> np.ndarray:
    """Where the whole window has one label: the areas without their margins; beyond the picture all goes on."""
    changed = np.zeros(labels.shape, dtype=bool)
    changed[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    changed[1:] |= labels[1:] != labels[:-1]
    return _box_sum(changed) == 0


def _box_sum(mask: np.ndarray) -> np.ndarray:
    """The number of true pixels in the window around each pixel [..., S, S]."""
    half = _WINDOW // 2
    padded = np.zeros((*mask.shape[:-2], _SIDE + 2 * half, _SIDE + 2 * half), dtype=np.uint8)
    padded[..., half:-half, half:-half] = mask
    rows = sum((padded[..., i : i + _SIDE, :] for i in range(1, _WINDOW)), padded[..., :_SIDE, :])
    return sum((rows[..., i : i + _SIDE] for i in range(1, _WINDOW)), rows[..., :_SIDE])


def _components(labels: np.ndarray) -> Iterator[np.ndarray]:
    """The masks of the connected areas of one label (by edges); -1 is no label.

    The runs of equal labels in each row are joined with those that they touch in the row above.
    """
    first = np.ones(labels.shape, dtype=bool)
    first[:, 1:] = labels[:, 1:] != labels[:, :-1]
    runs = first.ravel().cumsum().reshape(labels.shape) - 1
    touching = (labels[1:] == labels[:-1]) & (labels[1:] >= 0)
    parents = list(range(int(runs[-1, -1]) + 1))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    for pair in np.unique(runs[:-1][touching] * len(parents) + runs[1:][touching]).tolist():
        one, other = divmod(pair, len(parents))
        parents[root(other)] = root(one)
    roots = np.array([root(run) for run in range(len(parents))])[runs]
    for number in np.unique(roots[labels >= 0]):
        yield roots == number


def _filled(mask: np.ndarray) -> np.ndarray:
    """The mask with its holes and dents: a pixel that has some of it on all four sides. A convex shape stays as it is."""
    whole = np.ones_like(mask)
    for turned, back in ((mask, whole), (mask.T, whole.T)):
        back &= np.logical_or.accumulate(turned) & np.logical_or.accumulate(turned[::-1])[::-1]
    return whole


# ---- the shape of an area ----


def _recognised(mask: np.ndarray, colour: str) -> Shape:
    """The object of a mask, by the mask's taper and corners; `UNKNOWN` where the ideal shape covers too little of it."""
    y, x = np.nonzero(mask)
    area, x0, y0 = len(x), x.mean() + 0.5, y.mean() + 0.5
    x2, dy = (x + 0.5 - x0) ** 2, y + 0.5 - y0
    taper = (x2 * dy).mean() / (x2.mean() * dy.std())
    corners = (x2 * dy**2).mean() / (x2.mean() * dy.var())
    shape = "triangle" if taper > _TAPER else "square" if corners > _CORNERS else "circle"
    radius = {"circle": (area / np.pi) ** 0.5, "square": area**0.5 / 2, "triangle": (area / 2) ** 0.5}[shape]
    centre = y0 - (radius / 3 if shape == "triangle" else 0.0)
    ideal = _ideal(shape, x0, centre, radius)
    if taper < -_TAPER or (ideal & mask).sum() < _LEAST_FIT * (ideal | mask).sum():
        shape = UNKNOWN
    return Shape(shape, colour, x0 / _SIDE, centre / _SIDE, radius / _SIDE)


def _ideal(shape: str, x0: float, y0: float, r: float) -> np.ndarray:
    """The mask of a shape around (x0, y0), as `shapes.draw` draws it."""
    places = np.arange(_SIDE) + 0.5
    x, y = places[None] - x0, places[:, None] - y0
    if shape == "circle":
        return np.asarray(x**2 + y**2 <= r**2)
    within = (abs(x) <= r) & (abs(y) <= r)
    return within if shape == "square" else within & (abs(x) <= (y + r) / 2)
