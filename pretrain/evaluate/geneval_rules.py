"""GenEval's rules: whether the objects found in a picture are what its prompt asks for (arXiv:2310.11513, evaluate_images.py).

A prompt's line says what a picture must hold and must not:

    {"tag": "color_attr", "include": [{"class": "cow", "count": 1, "color": "red"}, …], "exclude": [], "prompt": "…"}

An object counts above a confidence of 0.3, or 0.9 where the task is counting, and at most 16 of a class do, the surest ones. Of a
class that must be there `count` times, the `count` surest are looked at. Objects that overlap are all kept, as published.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# By a line's `tag`: the names of the paper's Table 2.
TASKS = {
    "single_object": "single object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colours",
    "position": "positions",
    "color_attr": "colour attribution",
}
CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
MOST_OBJECTS = 16  # of a class
POSITION_SHARE = 0.1  # of two objects' sizes: a distance below it has no direction


@dataclass(frozen=True)
class Detection:
    """An object that a detector found.

    Attributes:
        box: left, top, right, bottom in pixels.
        mask_HW: where it is.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask_HW: np.ndarray | None = None


@dataclass(frozen=True)
class Required:
    """Objects that must be there: `position` is a relation to those of the include of this place."""

    label: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Spec:
    """What a prompt asks for. `exclude`: classes with the count that is one too many."""

    task: str
    include: tuple[Required, ...]
    exclude: tuple[Required, ...]

    @property
    def labels(self) -> set[str]:
        """The classes that it speaks of."""
        return {required.label for required in (*self.include, *self.exclude)}


Colours = Callable[[Sequence[Detection], str], list[str]]
"""Names the colours of found objects of a class."""


def spec_of(about: Mapping[str, Any], prompt: str | None) -> Spec:
    """What a prompt asks for, from the other fields of its line. Raises ValueError with what is wrong."""
    try:
        task = TASKS[about["tag"]]
        include = tuple(_required(entry, place) for place, entry in enumerate(about["include"]))
        return Spec(task, include, tuple(_required(entry, 0) for entry in about.get("exclude", ())))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"the prompt {prompt!r} is no line of GenEval ({reason}): expected tag ({', '.join(TASKS)}), include and, where "
            "something must not be there, exclude, as in its evaluation_metadata.jsonl"
        ) from error


def _required(entry: Mapping[str, Any], place: int) -> Required:
    colour, position = entry.get("color"), entry.get("position")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"color {colour!r} is none of {', '.join(COLOURS)}")
    if position is not None:
        relation, target = position
        if relation not in RELATIONS or target not in range(place):
            raise ValueError(f"position {position!r}: expected one of {', '.join(RELATIONS)}, and an earlier include")
        position = (relation, target)
    return Required(str(entry["class"]), int(entry["count"]), colour, position)


def kept(detections: Sequence[Detection], task: str) -> dict[str, list[Detection]]:
    """The detections that count, by class, the surest first."""
    threshold = COUNTING_CONFIDENCE if task == TASKS["counting"] else CONFIDENCE
    found: dict[str, list[Detection]] = defaultdict(list)
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold and len(found[detection.label]) < MOST_OBJECTS:
            found[detection.label].append(detection)
    return {label: objects for label, objects in found.items() if objects}


def faults(spec: Spec, found: Mapping[str, Sequence[Detection]], colours: Colours) -> list[str]:
    """Lists what differs from the prompt, a line each; an empty list where the picture is right."""
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for required in spec.include:
        objects = found.get(required.label, ())[: required.count]
        fault = _fault(required, objects, matched, colours)
        reasons += [fault] if fault else []
        matched.append(None if fault else objects)
    for excluded in spec.exclude:
        number = len(found.get(excluded.label, ()))
        if number >= excluded.count:
            reasons.append(f"{excluded.label}: {number}, expected fewer than {excluded.count}")
    return reasons


def _fault(
    required: Required,
    objects: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    colours: Colours,
) -> str | None:
    label = required.label
    if len(objects) < required.count:
        return f"{label}: {len(objects)}, expected {required.count}"
    if required.colour is not None:
        seen = colours(objects, label)
        if seen.count(required.colour) < required.count:
            return f"{label}: {', '.join(seen)}, expected {required.colour}"
    if required.position is not None:
        relation, target = required.position
        others = matched[target]
        if others is None:
            return f"{label}: nothing to be {relation}"
        for one in objects:
            for other in others:
                if relation not in (seen_at := relations(one, other)):
                    return f"{label}: {' and '.join(sorted(seen_at)) or 'nowhere'}, expected {relation}"
    return None


def relations(one: Detection, other: Detection) -> set[str]:
    """Where one object is from another: none of the relations, one, or two on a diagonal.

    By the offset of the boxes' centres, less a share of both objects' size, as a share of the centres' distance.
    """
    boxes_OCX = np.array([one.box, other.box], dtype=float).reshape(2, 2, 2)  # object, corner, axis
    offset_X = boxes_OCX[0].mean(0) - boxes_OCX[1].mean(0)
    size_X = (boxes_OCX[:, 1] - boxes_OCX[:, 0]).sum(0)
    clear_X = np.sign(offset_X) * np.maximum(np.abs(offset_X) - POSITION_SHARE * size_X, 0)
    if np.all(np.abs(clear_X) < 1e-3):
        return set()
    x, y = clear_X / np.linalg.norm(offset_X)
    where = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in where.items() if holds}
