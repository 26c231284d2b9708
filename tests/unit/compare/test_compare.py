"""pretrain.compare: what differs between runs, and each figure of its table, from made records whose values are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from data_prep.common.paths import distinct_names
from pretrain.compare.__main__ import main
from pretrain.config import load
from pretrain.models.cost import count_flops

BATCH = 32
CARD = {"fingerprint": "aa", "counts": {"written": 800}, "sets": {"images/256": {"samples": 395}}}
ENVIRONMENT = {
    "git_revision": "a" * 40,
    "git_dirty_diff": "",
    "versions": {"torch": "2.11.0"},
    "processes": 1,
    "device": "cpu",
}


def make(folder: Path, *overrides: str, steps: int = 8, seconds: float = 36.0, **files: Any) -> Path:
    """A run directory: `steps` logging steps, two optimizer steps apart, of `seconds` each; its loss is 1 / step."""
    config = load("demo_256", list(overrides))[0]
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config.model_dump(mode="json")), folder / "config.yaml")
    for name, content in {
        "ds_config": {"train_batch_size": BATCH},
        "environment": ENVIRONMENT,
        "dataset": CARD,
        **files,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for step in range(2, 2 * steps + 1, 2):
            writer.add_scalar("train/loss", loss(step), step)
            writer.add_scalar("speed/step_s", seconds, step)
    return folder


def loss(step: int) -> float:
    return 1 / step


def add(run: Path, tag: str, points: dict[int, float]) -> None:
    with SummaryWriter(str(run / "tensorboard"), filename_suffix=tag.replace("/", "_")) as writer:
        for step, value in points.items():
            writer.add_scalar(tag, value, step)


@pytest.fixture
def table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict[Any, list[str]], str]]:
    """Runs the command; gives the table's rows by their first cells, and all that was said."""

    def run(*runs: Path) -> tuple[dict[Any, list[str]], str]:
        assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
        said = capsys.readouterr().out
        assert said.startswith((tmp_path / "out/compare.md").read_text().strip())
        assert Image.open(tmp_path / "out/compare.png").width > 1000
        rows: dict[Any, list[str]] = {}
        for line in said.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else [""]
            if cells[0] in ("train/loss", "validation/loss"):
                rows[cells[0], cells[1], len([k for k in rows if k[:2] == (cells[0], cells[1])])] = cells[2:]
            elif cells[0] not in ("", "loss"):
                rows[cells[0]] = cells[1:]
        return rows, said

    return run


def test_what_differs_is_listed_and_nothing_else(table, tmp_path) -> None:
    environment = ENVIRONMENT | {"git_dirty_diff": "-a\n+b", "git_revision": "b" * 40}
    one = make(tmp_path / "one", "model.preset=dit_tiny", "name=one")
    card = CARD | {"counts": {"written": 801}}
    other = make(tmp_path / "two", "model.preset=focusdit_tiny", environment=environment, dataset=card)
    rows, said = table(one, other)
    facts = {key: row for key, row in rows.items() if isinstance(key, str)}
    presets = load("demo_256", ["model.preset=dit_tiny"])[0].model.backbone()
    focus = load("demo_256", ["model.preset=focusdit_tiny"])[0].model.backbone()
    fields = [key for key in vars(presets) if vars(presets)[key] != vars(focus)[key]]
    assert "mask" in fields
    assert set(facts) == {
        "code.revision", "code.uncommitted changes", "data set.counts.written", "config.model.preset",
        *(f"config.model.{key}" for key in fields),
    }  # fmt: skip
    assert facts["config.model.mask"] == ["none", focus.mask]
    assert facts["data set.counts.written"] == ["800", "801"]
    assert facts["code.revision"] == ["a" * 40, "b" * 40]
    assert facts["code.uncommitted changes"][0] == "none"
    assert facts["code.uncommitted changes"][1].startswith("2 lines of diff, SHA-256 ")
    assert "Note" not in said


def test_runs_alike_differ_in_nothing(table, tmp_path) -> None:
    rows, _ = table(make(tmp_path / "x/run"), make(tmp_path / "y/run"))
    assert [key for key in rows if isinstance(key, str)] == ["nothing"]


def test_losses_at_equal_images_flops_and_hours(table, tmp_path) -> None:
    """Each from the made curves by a loop over their points. The second run is shorter, faster, and of a larger backbone."""
    one = make(tmp_path / "one", "model.preset=dit_tiny", steps=8, seconds=36)
    two = make(tmp_path / "two", "model.preset=focusdit_tiny", steps=6, seconds=9)
    rows, _ = table(one, two)

    def flops(preset: str) -> float:
        backbone = load("demo_256", [f"model.preset={preset}"])[0].model.backbone()
        side = 256 // 8 // backbone.patch
        return 3 * BATCH * count_flops(backbone, (side, side), 120).total

    per_step = {
        "images": (BATCH, BATCH),
        "FLOPs": (flops("dit_tiny"), flops("focusdit_tiny")),
        "hours": (36 / 3600, 9 / 3600),
    }
    for axis, units in per_step.items():
        whole = min(16 * units[0], 12 * units[1])
        for number, share in enumerate((0.25, 0.5, 1.0)):
            place, *found = rows["train/loss", axis, number]
            assert float(place.replace(",", "")) == pytest.approx(share * whole, rel=1e-3)
            for unit, last, text in zip(units, (16, 12), found, strict=True):
                within = [
                    s for s in range(2, last + 1, 2) if 0.9 * share * whole < s * unit <= share * whole * (1 + 1e-9)
                ]
                before = [s for s in range(2, last + 1, 2) if s * unit <= share * whole * (1 + 1e-9)][-1:]
                values = [loss(s) for s in within or before]
                assert text == (f"{sum(values) / len(values):.4f}" if values else "none yet")
    assert rows["train/loss", "hours", 2][0] == "0.03"
    assert "none yet" in rows["train/loss", "hours", 0], "a quarter of the way of the faster one, no step of the other"


def test_flops_of_a_run_with_token_routing(table, tmp_path) -> None:
    """12 of its 16 steps are routed, and cost less: at equal FLOPs it has gone further."""
    words = ["model.preset=dit_tiny_deep", "steps=16", "optimizer.warmup_steps=0"]
    plain = make(tmp_path / "plain", *words)
    routed = make(tmp_path / "routed", *words, "routing.name=tread", "routing.until=0.75")
    rows, said = table(plain, routed)
    config = load("demo_256", [*words, "routing.name=tread"])[0]
    backbone = config.model.backbone()
    some, every = (count_flops(backbone, (8, 8), 120, None, r).total for r in (config.routing.build(backbone), None))
    whole = 3 * BATCH * (12 * some + 4 * every)
    assert float(rows["train/loss", "FLOPs", 2][0].replace(",", "")) == pytest.approx(whole, rel=1e-3)
    assert rows["train/loss", "FLOPs", 2][2] == f"{loss(16):.4f}"
    assert "token routing differs, so that a train/loss of one does not compare" in said
    other = make(tmp_path / "other", *words)
    kept = OmegaConf.load(other / "config.yaml")
    kept.routing.first = 3  # an earlier version kept a number for runs without routing, too
    OmegaConf.save(kept, other / "config.yaml")
    assert "token routing" not in table(plain, other)[1], "none of the two is routed"


def test_validation_lies_between_its_points(table, tmp_path) -> None:
    one, two, three = (make(tmp_path / name) for name in ("one", "two", "three"))
    add(one, "validation/loss", {0: 4.0, 8: 2.0, 16: 1.0})
    add(two, "validation/loss", {0: 3.0, 16: 1.0})
    rows, _ = table(one, two)
    assert rows["validation/loss", "images", 0] == ["128", "3.0000", "2.5000"]
    assert rows["validation/loss", "images", 1] == ["256", "2.0000", "2.0000"]
    assert rows["validation/loss", "images", 2] == ["512", "1.0000", "1.0000"]
    rows, said = table(one, three)
    assert ("validation/loss", "images", 0) not in rows
    assert "validation/loss: not in every run, so left out" in said


def test_values_that_are_not_finite_are_shown(table, tmp_path) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    add(two, "train/loss", {16: math.nan})
    rows, _ = table(one, two)
    assert rows["train/loss", "images", 2][1:] == [f"{(1 / 16):.4f}", "nan (1 of 1 points not finite)"]


@pytest.mark.parametrize(
    ("overrides", "files", "note"),
    [
        (["objective.mean=0.5"], {}, "the objectives differ"),
        ([], {"dataset": CARD | {"fingerprint": "bb"}}, "resolution or encoders differ"),
        ([], {"environment": ENVIRONMENT | {"processes": 2}}, "devices or processes differ"),
        ([], {"environment": ENVIRONMENT | {"git_revision": None}}, "the code's revision is unknown"),
    ],
)
def test_what_makes_them_hard_to_compare_is_said(table, tmp_path, overrides, files, note) -> None:
    _, said = table(make(tmp_path / "one"), make(tmp_path / "two", *overrides, **files))
    assert f"Note: {note}" in said


def test_missing_records_are_named_with_how_to_make_them(tmp_path, capsys) -> None:
    whole, lacking = make(tmp_path / "whole"), make(tmp_path / "lacking")
    (lacking / "environment.json").unlink()
    for file in (lacking / "tensorboard").iterdir():
        file.unlink()
    assert main([str(whole), str(lacking), str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{lacking} has no environment.json, no curve train/loss in tensorboard/" in line
    assert f"{tmp_path} has no config.yaml" in line and "python -m pretrain.train writes" in line
    assert str(whole) + " has" not in line


def test_one_run_is_nothing_to_compare(tmp_path, capsys) -> None:
    run = make(tmp_path / "one")
    assert main([str(run), str(run)]) == 1
    assert capsys.readouterr().err == "compare: give two different run directories at least\n"


def test_a_damaged_record_is_one_error(tmp_path, capsys) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    (two / "environment.json").write_text("{")
    assert main([str(one), str(two)]) == 1
    assert f"compare: {two / 'environment.json'} cannot be read as JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["a/x", "a/y"], ["x", "y"]),
        (["a/run", "b/run", "c"], ["a/run", "b/run", "analyses/c"]),
        (["a/b/run", "c/b/run"], ["a/b/run", "c/b/run"]),
    ],
)
def test_names_are_as_long_as_it_takes_to_tell_them_apart(monkeypatch, tmp_path, folders, names) -> None:
    (tmp_path / "analyses").mkdir()
    monkeypatch.chdir(tmp_path / "analyses")
    assert distinct_names([Path(folder) for folder in folders]) == names
