"""The checker of captioned shapes: it sees true pictures, also damaged ones, as they are, and what is wrong in others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.shapes import COLOURS, Scene, Shape, check, draw, scene_of, scenes
from data_prep.shapes_checker import TASKS, UNKNOWN, Seen, by_figure, compare, judge, mean_of_tasks, recognise
from pretrain.bench.shapes import ATTRIBUTES, accuracy, damages, failed, seen_of

TRUE = list(scenes(90, seed=21))


@pytest.mark.parametrize("side", [128, 320, 512])
def test_true_pictures_are_right_in_all(side: int) -> None:
    figures = by_figure(judge(draw(scene, side), scene).figures for scene in TRUE)
    assert [*figures] == [*TASKS, "background", "sizes", "whole"]
    assert {name: sum(values) / len(values) for name, values in figures.items()} == dict.fromkeys(figures, 1.0)
    assert mean_of_tasks(figures) == 1.0


@pytest.mark.parametrize("name", damages())
def test_damaged_pictures_are_right_in_all(name: str) -> None:
    some = TRUE[:45]
    found = accuracy(some, [seen for _, seen in seen_of(some, damages()[name])])
    assert min(found.values()) >= (0.99 if name in ("none", "JPEG of quality 30", "tiny VAE and back") else 0.9), found


@pytest.mark.parametrize(("kind", "attribute"), [(kind, name) for kind in ATTRIBUTES for name in ATTRIBUTES[kind]])
def test_a_wrong_attribute_fails_its_task(kind: str, attribute: str) -> None:
    shares = failed(kind, attribute, 60, seed=3)
    task = ATTRIBUTES[kind][attribute]
    assert shares.pop(task) >= 0.99
    if attribute != "number":  # objects that are not there have neither colour nor place
        assert max(shares.values()) <= 0.01


def test_ragged_edges_that_the_strict_measure_does_not_see_as_shapes() -> None:
    entries = seen_of(TRUE, damages()["ragged edges"])
    strict = [check(picture, scene).shapes for (picture, _), scene in zip(entries, TRUE, strict=True)]
    judged = [right for right in strict if right is not None]
    assert sum(judged) / len(judged) < 0.7


def test_every_colour_on_every_other() -> None:
    for background in COLOURS:
        for colour in COLOURS.keys() - {background}:
            scene = Scene((Shape("circle", colour, 0.5, 0.5, 0.23),), background, "")
            soft = draw(scene, 64).resize((256, 256), Image.Resampling.BICUBIC)
            seen = recognise(soft)
            assert (seen.background, [(o.colour, o.shape) for o in seen.objects]) == (background, [(colour, "circle")])


def picture(*boxes: tuple[int, int, int, int], kind: str = "rectangle") -> Image.Image:
    image = Image.new("RGB", (128, 128), COLOURS["white"])
    for box in boxes:
        getattr(ImageDraw.Draw(image), kind)(box, fill=COLOURS["red"])
    return image


@pytest.mark.parametrize(
    ("image", "shapes"),
    [
        (picture(), []),
        (picture((20, 20, 60, 60), (80, 80, 84, 84)), ["square"]),  # a speck
        (picture((20, 20, 60, 60), (60, 40, 127, 42)), ["square"]),  # a hair
        (picture((10, 10, 50, 50), (70, 10, 110, 50), (50, 28, 70, 30)), ["square", "square"]),  # joined by a hair
        (picture((10, 60, 118, 75)), [UNKNOWN]),  # a bar
        (picture((10, 50, 118, 85), kind="ellipse"), [UNKNOWN]),
        (picture((10, 10, 60, 60), kind="ellipse"), ["circle"]),
    ],
)
def test_what_is_no_object_or_no_shape(image: Image.Image, shapes: list[str]) -> None:
    assert [o.shape for o in recognise(image).objects] == shapes


def test_a_hole_belongs_to_the_object() -> None:
    image = picture((20, 20, 100, 100))
    ImageDraw.Draw(image).rectangle((50, 50, 70, 70), fill=COLOURS["white"])
    assert [o.shape for o in recognise(image).objects] == ["square"]


def test_noise_alone_shows_nothing() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert recognise(Image.fromarray(levels)).objects == ()


# ---- GenEval's rules ----

PAIR = scene_of("a small red circle above a large blue square on a yellow background")


def seen(*objects: Shape) -> dict[str, bool]:
    return dict(compare(Seen("yellow", objects), PAIR).tasks)


def test_objects_beside_the_captions_fail_the_number_only() -> None:
    third = replace(PAIR.objects[0], shape="triangle", x=0.1, y=0.5)
    assert seen(*PAIR.objects, third) == {"two_objects": False, "position": True, "colour_attribution": True}


def test_objects_are_told_by_shape_and_colour() -> None:
    circle, square = PAIR.objects
    swapped = replace(circle, colour="blue"), replace(square, colour="red")
    assert seen(*swapped) == {"two_objects": True, "position": True, "colour_attribution": False}
    both_squares = replace(circle, shape="square"), square
    assert seen(*both_squares[::-1]) == {"two_objects": False, "position": True, "colour_attribution": True}
    both_unlike = replace(circle, shape="square"), replace(square, shape="triangle")
    assert seen(*both_unlike[::-1]) == {"two_objects": False, "position": True, "colour_attribution": True}
    upside_down = replace(circle, y=0.75), replace(square, y=0.25)
    assert seen(*upside_down) == {"two_objects": True, "position": False, "colour_attribution": True}


def test_an_object_that_is_not_there_has_no_place_and_no_colour() -> None:
    assert seen(PAIR.objects[0]) == {"two_objects": False, "position": False, "colour_attribution": False}


def test_the_mean_is_over_tasks_not_pictures() -> None:
    assert mean_of_tasks({"counting": [True, True, True, False], "position": [False], "whole": [True]}) == 0.375
