"""The captioned-shapes world: deterministic, true captions, and a checker that sees what is wrong."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.inputs.samples import Sample
from data_prep.inputs.tars import read_tar
from data_prep.shapes import (
    COLOURS,
    RADII,
    SHAPES,
    Scene,
    Shape,
    check,
    draw,
    edge_distance,
    main,
    random_scene,
    scene_of,
    scenes,
    write_tars,
)


@pytest.mark.parametrize("side", [128, 256, 512])
def test_the_checker_reads_back_what_was_drawn(side: int) -> None:
    for scene in scenes(60, seed=9):
        verdict = check(draw(scene, side), scene)
        assert verdict.colours, scene.caption
        assert verdict.shapes is not False, scene.caption


def test_the_checker_sees_what_is_wrong() -> None:
    rng = random.Random(1)
    for scene in scenes(40, seed=10):
        picture = draw(scene)
        others = [c for c in COLOURS if c != scene.background and c not in scene.foreground]
        assert not check(picture, replace(scene, background=rng.choice(others))).background
        o = scene.objects[0]
        recoloured = replace(scene, objects=(replace(o, colour=rng.choice(others)), *scene.objects[1:]))
        assert not check(picture, recoloured).foreground
        if len(scene.foreground) == len(scene.objects):
            reshaped = replace(o, shape=rng.choice([s for s in SHAPES if s != o.shape]))
            assert check(picture, replace(scene, objects=(reshaped, *scene.objects[1:]))).shapes is False
    empty = check(Image.new("RGB", (256, 256), COLOURS[scene.background]), scene)
    assert empty.background and not empty.foreground


def test_captions_name_every_object_and_the_background() -> None:
    sizes = {radius: size for radii in RADII.values() for size, radius in radii.items()}
    for scene in scenes(60, seed=11):
        assert scene.caption.endswith(f"on a {scene.background} background")
        for o in scene.objects:
            assert f"{sizes[o.radius]} {o.colour} {o.shape}" in scene.caption
        assert scene.background not in scene.foreground


def test_edges_lie_as_far_from_their_places_as_they_are_moved() -> None:
    areas = {"circle": np.pi, "square": 4.0, "triangle": 2.0}
    outlines = {"circle": 2 * np.pi, "square": 8.0, "triangle": 2 + 20**0.5}
    for shape in SHAPES:
        o = Shape(shape, "red", 0.5, 0.5, 128 / 512)
        scene = Scene((o,), "white", "")
        assert edge_distance(draw(scene), scene) == 0
        larger = draw(replace(scene, objects=(replace(o, radius=144 / 512),)))
        # PIL draws the pixels of an outline, too, which is a part of the ring's 16 pixels.
        ring = areas[shape] * (144**2 - 128**2) / 512**2
        assert edge_distance(larger, scene) == pytest.approx(ring / (outlines[shape] * o.radius), rel=0.08), shape
        wrong = draw(replace(scene, background="cyan"))
        assert edge_distance(wrong, scene) > 0.2, "a wrong colour counts with its whole area"


def test_tars_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first = [p.read_bytes() for p in write_tars(tmp_path / "a", 12, seed=3, per_tar=5)]
    again = [p.read_bytes() for p in write_tars(tmp_path / "b", 12, seed=3, per_tar=5)]
    other = [p.read_bytes() for p in write_tars(tmp_path / "c", 12, seed=4, per_tar=5)]
    assert len(first) == 3
    assert first == again
    assert first != other
    samples = [s for p in sorted((tmp_path / "a").glob("*.tar")) for s in read_tar(p)]
    assert all(isinstance(s, Sample) for s in samples)
    assert [s.caption for s in samples if isinstance(s, Sample)] == [s.caption for s in scenes(12, seed=3)]


def test_kinds_come_in_turn_as_often_as_they_are_named(tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--pictures", "6", "--kinds", "one", "one", "pair"]
    assert main(arguments) == 0
    captions = [s.caption for p in tmp_path.glob("*.tar") for s in read_tar(p) if isinstance(s, Sample)]
    assert [len(scene_of(c).objects) for c in captions] == [1, 1, 2] * 2
    with pytest.raises(SystemExit):
        main([*arguments, "many"])
    with pytest.raises(ValueError, match="'many'; the kinds are one, count, pair"):
        list(scenes(1, seed=0, kinds=("many",)))


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="the kinds are one, count, pair"):
        random_scene(random.Random(0), "many")
