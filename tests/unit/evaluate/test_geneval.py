"""GenEval: its rules on drawn scenes with a detector that knows what was drawn; its models with random weights."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.shapes import COLOURS, RELATIONS, Scene, Shape, draw, random_scene, scene_of
from pretrain.evaluate import clip, geneval_models
from pretrain.evaluate.__main__ import main
from pretrain.evaluate.geneval_models import ClipColours, Mask2Former, box_of, crop
from pretrain.evaluate.geneval_rules import COLOURS as PUBLISHED_COLOURS
from pretrain.evaluate.geneval_rules import Detection, faults, kept, relations, spec_of
from pretrain.evaluate.metric import NotRun
from pretrain.evaluate.metrics import METRICS

SIDE = 96


def found_in(scene: Scene, scores: Sequence[float] = ()) -> list[Detection]:
    """What a faultless detector finds: each object with its mask and box; its confidence is 0.95, or is given."""
    detections = []
    for i, o in enumerate(scene.objects):
        alone = Scene((replace(o, colour="white"),), "black", "")
        mask_HW = np.asarray(draw(alone, SIDE).convert("L")) > 127
        detections.append(Detection(o.shape, scores[i] if scores else 0.95, box_of(mask_HW), mask_HW))
    return detections


def colours_of(scene: Scene) -> Any:
    """Names colours by the pixels of cut-out objects; sees the background where it is not cut away."""

    def colours(objects: Sequence[Detection], label: str) -> list[str]:
        return [main_colour(crop(draw(scene, SIDE), o)) for o in objects]

    return colours


def main_colour(cut_out: Image.Image) -> str:
    """The commonest colour that is not the grey around an object."""
    pixels_NC = np.asarray(cut_out, dtype=int).reshape(-1, 3)
    pixels_NC = pixels_NC[np.abs(pixels_NC - 153).sum(1) > 30]
    distances_NP = ((pixels_NC[:, None] - np.array(list(COLOURS.values()))) ** 2).sum(-1)
    return list(COLOURS)[int(np.bincount(distances_NP.argmin(1)).argmax())]


def include(label: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **more}


def wrong(tag: str, scene: Scene, *included: dict[str, Any], scores: Sequence[float] = (), **more: Any) -> list[str]:
    spec = spec_of({"tag": tag, "include": list(included), **more}, "p")
    return faults(spec, kept(found_in(scene, scores), spec.task), colours_of(scene))


def scene(*objects: tuple[str, str, float, float], background: str = "white", radius: float = 0.12) -> Scene:
    """Objects (shape, colour, x, y) on a background."""
    return Scene(tuple(Shape(s, c, x, y, radius) for s, c, x, y in objects), background, "")


# ---- the tasks ----


def test_single_object() -> None:
    one = scene_of("a small red circle at the top on a blue background")
    assert wrong("single_object", one, include("circle")) == []
    assert wrong("single_object", one, include("square")) == ["square: 0, expected 1"]
    assert wrong("single_object", one, include("circle"), scores=[0.3]) == ["circle: 0, expected 1"]
    assert wrong("single_object", one, include("circle"), scores=[0.31]) == []


def test_two_objects() -> None:
    pair = scene_of("a small red circle above a large blue square on a yellow background")
    assert wrong("two_object", pair, include("circle"), include("square")) == []
    assert wrong("two_object", pair, include("circle"), include("triangle")) == ["triangle: 0, expected 1"]


def test_counting_wants_surer_objects_and_no_more() -> None:
    three = scene_of("three small red circles on a blue background")

    def count(n: int, scores: Sequence[float] = ()) -> list[str]:
        return wrong("counting", three, include("circle", n), exclude=[include("circle", n + 1)], scores=scores)

    assert count(3) == [] and count(4) == ["circle: 3, expected 4"]
    assert count(2) == ["circle: 3, expected fewer than 3"]
    assert count(2, [0.95, 0.9, 0.91]) == []  # the second is not sure enough to be counted


def test_at_most_sixteen_of_a_class() -> None:
    many = scene(*(("circle", "red", 0.5, 0.5) for _ in range(20)))
    assert wrong("single_object", many, include("circle", 16), exclude=[include("circle", 17)]) == []


def test_colours_are_those_of_the_object_not_its_surroundings() -> None:
    small = scene_of("a small red triangle in the centre on a blue background")
    assert wrong("colors", small, include("triangle", color="red")) == []
    assert wrong("colors", small, include("triangle", color="blue")) == ["triangle: red, expected blue"]
    blurred = replace(found_in(small)[0], mask_HW=None)  # without its mask the box's background is seen, too
    assert crop(draw(small, SIDE), blurred).getpixel((0, 0)) == COLOURS["blue"]
    assert crop(draw(small, SIDE), found_in(small)[0]).getpixel((0, 0)) == (153, 153, 153)


def test_the_surest_object_is_looked_at() -> None:
    two = scene(("circle", "red", 0.2, 0.5), ("circle", "blue", 0.8, 0.5))
    assert wrong("colors", two, include("circle", color="red"), scores=[0.9, 0.8]) == []
    assert wrong("colors", two, include("circle", color="red"), scores=[0.8, 0.9]) == ["circle: blue, expected red"]
    assert wrong("colors", two, include("circle", 2, color="red")) == ["circle: red, blue, expected red"]


@pytest.mark.parametrize("relation", RELATIONS)
def test_positions(relation: str) -> None:
    pair = scene_of(f"a small red circle {relation} a large blue square on a yellow background")
    for asked in RELATIONS:
        found = wrong("position", pair, include("square"), include("circle", position=[asked, 0]))
        assert found == ([] if asked == relation else [f"circle: {relation}, expected {asked}"])
    missing = wrong("position", pair, include("triangle"), include("circle", position=[relation, 0]))
    assert missing == ["triangle: 0, expected 1", f"circle: nothing to be {relation}"]


def test_colour_attribution() -> None:
    pair = scene_of("a small red circle above a large blue square on a yellow background")
    assert wrong("color_attr", pair, include("circle", color="red"), include("square", color="blue")) == []
    swapped = wrong("color_attr", pair, include("circle", color="blue"), include("square", color="red"))
    assert swapped == ["circle: red, expected blue", "square: blue, expected red"]


def box(x: float, y: float, width: float = 10, height: float = 10) -> Detection:
    return Detection("a", 1.0, (x - width / 2, y - height / 2, x + width / 2, y + height / 2))


@pytest.mark.parametrize(
    ("x", "y", "found"),
    [
        (1.9, 0, set()),  # a tenth of both widths is 2
        (4.1, 0, {"right of"}),  # (4.1 - 2) / 4.1 > 0.5
        (3.9, 0, set()),  # (3.9 - 2) / 3.9 < 0.5
        (-30, -30, {"left of", "above"}),
        (30, 30, {"right of", "below"}),
        (10, -40, {"above"}),
    ],
)
def test_directions_need_a_distance(x: float, y: float, found: set[str]) -> None:
    assert relations(box(x, y), box(0, 0)) == found


@pytest.mark.parametrize(
    ("about", "line"),
    [
        ({}, "the prompt 'p' is no line of GenEval (no 'tag'): expected tag (single_object, two_object, counting"),
        ({"tag": "colours", "include": []}, "(no 'colours')"),
        ({"tag": "colors", "include": [include("cow", color="beige")]}, "color 'beige' is none of red, orange"),
        (
            {"tag": "position", "include": [include("cow", position=["over", 0])]},
            "position ['over', 0]: expected one of",
        ),
        ({"tag": "position", "include": [include("cow", position=["above", 0])]}, "and an earlier include"),
        ({"tag": "colors", "include": [{"class": "cow"}]}, "(no 'count')"),
    ],
)
def test_wrong_lines_are_one_line(about: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        spec_of(about, "p")
    assert line in str(error.value)


# ---- the command ----


@dataclass
class Scripted:
    """A detector, and a namer of colours, that know the pictures' scenes."""

    scenes: Mapping[str, Scene]
    identity: Mapping[str, Any]
    labels: frozenset[str] = frozenset({"circle", "square", "triangle"})

    def detect(self, image: Image.Image) -> list[Detection]:
        return found_in(self.scenes[hashlib.sha256(image.tobytes()).hexdigest()])

    def colours(self, crops: Sequence[Image.Image], label: str) -> list[str]:
        return [main_colour(cut_out) for cut_out in crops]


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command's words for three prompts of four pictures each, of which 4, 3 and 1 are right."""
    red, blue = scene(("circle", "red", 0.5, 0.5)), scene(("circle", "blue", 0.5, 0.5))
    pair = scene(("square", "green", 0.5, 0.2), ("triangle", "black", 0.5, 0.8))
    drawn = [red, blue, red, blue, red, red, blue, red, pair, red, red, red]
    lines = [
        {"tag": "single_object", "include": [include("circle")], "prompt": "a photo of a circle"},
        {"tag": "colors", "include": [include("circle", color="red")], "prompt": "a photo of a red circle"},
        {
            "tag": "position",
            "include": [include("triangle"), include("square", position=["above", 0])],
            "prompt": "a photo of a square above a triangle",
        },
    ]
    known, folder = {}, tmp_path / "pictures"
    folder.mkdir()
    for i, one in enumerate(drawn):
        image = draw(one, SIDE)
        known[hashlib.sha256(image.tobytes()).hexdigest()] = one
        image.save(folder / f"{i:02d}.png")
    (tmp_path / "lines.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    monkeypatch.setattr(geneval_models, "Mask2Former", lambda name, device: Scripted(known, {"detector": name}))
    monkeypatch.setattr(geneval_models, "ClipColours", lambda clip: Scripted(known, {"clip": clip}))
    for metric in METRICS.values():
        metric()  # a module that is first imported now would keep what replaces the name
    monkeypatch.setattr(clip, "Clip", lambda name, option, device: name)
    words = ["--pictures", str(folder), "--prompts", str(tmp_path / "lines.jsonl"), "--per-prompt", "4"]
    return [*words, "--metrics", "geneval", "--out", str(tmp_path / "out"), "--geneval-detector", "D"]


def test_results_have_the_form_of_table_2(scripted: list[str], tmp_path: Path) -> None:
    assert main(scripted) == 0
    found = json.loads((tmp_path / "out/geneval.json").read_text())
    shown = {name: (value["value"], value["count"]) for name, value in found["values"].items()}
    assert shown == {
        "overall": ((1 + 0.75 + 0.25) / 3, 12),
        "single object": (1.0, 4),
        "colours": (0.75, 4),
        "positions": (0.25, 4),
    }
    assert list(shown) == ["overall", "single object", "colours", "positions"]
    assert found["notes"] == {
        "tasks without prompts": ["two objects", "counting", "colour attribution"],
        "pictures of a prompt": 4.0,
        "pictures of a prompt, published": 4,
    }
    (path,) = (tmp_path / "out/records").rglob("*.jsonl")
    records = [json.loads(line)["record"] for line in path.read_text().splitlines() if line]
    assert records[6] == {"task": "colours", "wrong": ["circle: blue, expected red"], "found": {"circle": 1}}


def test_a_class_that_the_detector_does_not_know_is_said(
    scripted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(lines.read_text().replace('"triangle"', '"zebra"'))
    assert main(scripted) == 1
    assert "geneval: the detector does not know zebra; give one that" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "no detector; give --geneval-detector FOLDER"),
        (["--geneval-detector", "/nowhere"], "no CLIP; give --geneval-clip FOLDER"),
    ],
)
def test_without_weights_nothing_is_run(
    tmp_path: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    line = {"tag": "single_object", "include": [include("cow")], "prompt": "a cow"}
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    words = ["--pictures", str(tmp_path), "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*words, "--metrics", "geneval", *options]) == 0
    assert f"| geneval | not run: {reason}" in capsys.readouterr().out


# ---- the models ----


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mask2Former with random weights that is sure of two of its three classes."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,  # type: ignore[arg-type]
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        id2label={0: "person", 1: "mouse", 2: "tvmonitor"},
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = Mask2FormerForUniversalSegmentation(config)
        model.class_predictor.weight.normal_(std=1.0)
        model.class_predictor.bias[:] = torch.tensor([-9.0, 0.0, 0.0, -9.0])
    folder = tmp_path_factory.mktemp("detector") / "mask2former"
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, num_labels=3, ignore_index=255).save_pretrained(folder)
    return folder


def test_mask2formers_objects(mask2former: Path, one_thread: None) -> None:
    """Labels by GenEval's names; class times mean mask probability as confidence; boxes that hold the masks."""
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    detector = Mask2Former(str(mask2former), torch.device("cpu"))
    assert detector.labels == {"person", "computer mouse", "tv"}
    image = draw(random_scene(random.Random(0)), 48).resize((60, 40))
    found = detector.detect(image)
    with torch.no_grad():
        pixels = Mask2FormerImageProcessor.from_pretrained(mask2former)(images=image, return_tensors="pt")
        outputs = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()(**pixels)
    classes_QK = outputs.class_queries_logits[0].softmax(-1)[:, :-1]
    masks_QHW = torch.nn.functional.interpolate(outputs.masks_queries_logits, (384, 384), mode="bilinear")[0]
    surest = sorted(((float(classes_QK[q, k]), q, k) for q in range(6) for k in range(3)), reverse=True)[:6]
    expected = []
    for sureness, query, label in surest:  # as many as there are queries
        inside = masks_QHW[query] > 0
        if inside.any() and (score := sureness * float(masks_QHW[query].sigmoid()[inside].mean())) >= 0.3:
            expected.append((score, ["person", "computer mouse", "tv"][label]))
    by_score = sorted(((d.score, d.label) for d in found), reverse=True)
    assert [label for _, label in by_score] == [label for _, label in sorted(expected, reverse=True)]
    assert [score for score, _ in by_score] == pytest.approx(sorted((s for s, _ in expected), reverse=True), abs=1e-4)
    assert len(expected) >= 2
    for d in found:
        assert d.mask_HW is not None and d.mask_HW.shape == (40, 60)
        left, top, right, bottom = map(int, d.box)
        assert d.mask_HW[top:bottom, left:right].sum() == d.mask_HW.sum() > 0
        assert d.mask_HW[top].any() and d.mask_HW[bottom - 1].any()
        assert d.mask_HW[:, left].any() and d.mask_HW[:, right - 1].any()


def test_colours_by_a_clip_of_transformers(clip_folder: Path, one_thread: None) -> None:
    """The ten colours' mean descriptions, computed one by one here."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

    cut_outs = [Image.effect_noise((20, 30), sigma).convert("RGB") for sigma in (10, 50, 90)]
    cut_outs += [Image.new("RGB", (30, 20), COLOURS[name]) for name in COLOURS]
    found = ClipColours(clip.Clip(str(clip_folder), "--clip", torch.device("cpu"))).colours(cut_outs, "cow")

    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer, images = CLIPTokenizerFast.from_pretrained(clip_folder), CLIPImageProcessor.from_pretrained(clip_folder)

    def unit(vector: torch.Tensor) -> torch.Tensor:
        return vector / vector.norm()

    with torch.no_grad():
        by_colour = {}
        for name in PUBLISHED_COLOURS:
            texts = [f"a photo of a {name} cow", f"a photo of a {name}-colored cow", f"a photo of a {name} object"]
            vectors = [unit(model.get_text_features(**tokenizer(text, return_tensors="pt"))[0]) for text in texts]
            by_colour[name] = unit(sum(vectors))  # type: ignore[arg-type]
        for cut_out, said in zip(cut_outs, found, strict=True):
            vector = model.get_image_features(**images(cut_out, return_tensors="pt"))[0]
            nearness = {name: float(unit(vector) @ of) for name, of in by_colour.items()}
            assert nearness[said] == pytest.approx(max(nearness.values()), abs=1e-5)


def test_the_command_with_both_models(mask2former: Path, clip_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        draw(random_scene(random.Random(i)), 48).save(folder / f"{i}.png")
    line = {"tag": "colors", "include": [include("computer mouse", color="red")], "prompt": "a red computer mouse"}
    (tmp_path / "p.jsonl").write_text(f"{json.dumps(line)}\n" * 3)
    words = ["--pictures", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out")]
    words += ["--geneval-detector", str(mask2former), "--geneval-clip", str(clip_folder), "--metrics", "geneval"]
    assert main(words) == 0
    found = json.loads((tmp_path / "out/geneval.json").read_text())
    assert found["values"]["colours"]["count"] == 3
    hashes = [found["scorer"][part]["weights"]["model.safetensors"] for part in ("detector", "colours")]
    expected = [hashlib.sha256((f / "model.safetensors").read_bytes()).hexdigest() for f in (mask2former, clip_folder)]
    assert hashes == expected
    (path,) = (tmp_path / "out/records").rglob("*.jsonl")
    before = path.read_bytes()
    assert main(words) == 0 and path.read_bytes() == before  # nothing is judged twice


def test_a_picture_without_objects(mask2former: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geneval_models, "CONFIDENCE", 0.99)
    assert Mask2Former(str(mask2former), torch.device("cpu")).detect(Image.new("RGB", (30, 20))) == []


def test_no_detector_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(NotRun, match="--geneval-detector /nowhere: no Mask2Former that can be loaded"):
        Mask2Former("/nowhere", torch.device("cpu"))


def test_a_missing_package_is_not_run(mask2former: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils._scipy_available", False)
    with pytest.raises(NotRun, match="requires the scipy library") as error:
        Mask2Former(str(mask2former), torch.device("cpu"))
    assert "\n" not in str(error.value)


class Colourful:
    """Embeddings on eleven axes: a picture's is its colour's; a text's is its colour's, less of it where it says "object"."""

    def __init__(self) -> None:
        self.identity, self.resize = {"weights": "none"}, {}
        self.texts: list[str] = []

    def captions(self, texts: Sequence[str]) -> tuple[torch.Tensor, list[bool]]:
        self.texts += texts
        found = torch.zeros(len(texts), 11)
        for row, text in zip(found, texts, strict=True):
            (colour,) = (c for c in PUBLISHED_COLOURS if f" {c}" in text)
            row[PUBLISHED_COLOURS.index(colour)] = 0.6 if "object" in text else 1.0
            row[10] = 0.8 if "object" in text else 0.0
        return found, [False] * len(texts)

    def pictures(self, images: Sequence[Image.Image]) -> torch.Tensor:
        found = torch.full((len(images), 11), 0.1)
        for row, image in zip(found, images, strict=True):
            row[PUBLISHED_COLOURS.index(main_colour(image))] = 1.0
        return found


def test_the_nearest_colour_of_three_descriptions() -> None:
    clip = Colourful()
    classifier = ClipColours(clip)  # type: ignore[arg-type]
    cut_outs = [Image.new("RGB", (4, 4), COLOURS[colour]) for colour in ("white", "purple", "red")]
    assert classifier.colours(cut_outs, "cow") == ["white", "purple", "red"]
    assert classifier.colours(cut_outs[:1], "cow") == ["white"]
    assert clip.texts[:3] == ["a photo of a red cow", "a photo of a red-colored cow", "a photo of a red object"]
    assert len(clip.texts) == 30  # once for a class
