"""Ablations: the rows of Table 3 as they are meant, cells that run once, means and paired tests against known values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from support import ended, fork_command

from pretrain.ablate import cells as cells_module
from pretrain.ablate import running
from pretrain.ablate.__main__ import main
from pretrain.ablate.cells import Cell, forward_flops, mean_step_s
from pretrain.ablate.less import STUDY as LESS
from pretrain.ablate.neighbours import STUDY as NEIGHBOURS
from pretrain.ablate.report import plot, table
from pretrain.ablate.statistics import mean_and_sem, paired, student_p
from pretrain.ablate.study import DATA, SHAPES_CAPTION, Row, Scale, Study
from pretrain.ablate.table3 import STUDY
from pretrain.config import load
from pretrain.models import DiTConfig
from pretrain.models.cost import count_flops, count_parameters
from pretrain.models.presets import preset

# ---- the rows ----


def backbone(row: str, scale: str = "tiny", seed: int = 0) -> DiTConfig:
    chosen = STUDY.scales[scale]
    return load(chosen.config, STUDY.settings(row, chosen, seed))[0].model.backbone()


@pytest.mark.parametrize("scale", STUDY.scales)
def test_rows_differ_by_what_they_name(scale: str) -> None:
    a, b2, vr3 = backbone("A", scale), backbone("B2", scale), backbone("VR3", scale)
    assert (a.mask, a.ffn) == ("none", "uniform")
    for row, layers in (("B1", 2), ("B2", 5), ("B3", 10)):
        found = backbone(row, scale)
        assert len(found.mask_hidden) + 1 == layers
        assert (found.mask_dropout, found.mask_previous, found.ffn) == (0, False, "uniform")
    c, d = backbone("C", scale), backbone("D", scale)
    assert (c.mask_dropout, c.mask_previous) == (0.1, False) and (d.mask_dropout, d.mask_previous) == (0, True)
    assert c.mask_hidden == d.mask_hidden == b2.mask_hidden == vr3.mask_hidden
    for width in (1, 2, 3):
        found = backbone(f"VR{width}", scale)
        assert (found.mask_dropout, found.mask_previous, found.ffn, found.shared_width) == (0.1, True, "shared", width)


def test_rows_share_all_but_their_own_settings() -> None:
    """The same stage, batch, data and seed: the same samples in the same order, with the same noise."""
    scale = STUDY.scales["tiny"]
    for row in STUDY.rows:
        config, deepspeed = load(scale.config, STUDY.settings(row, scale, 7))
        base, base_deepspeed = load(scale.config, STUDY.settings("A", scale, 7))
        own = {"model": None, "name": None, "run_dir": None}
        assert config.model_dump() | own == base.model_dump() | own
        assert deepspeed == base_deepspeed and config.seed == 7


def test_the_papers_sizes_at_the_papers_scale() -> None:
    """§5: the baseline's 1.078B with other captions, and 0.1993B for the mask (B2 has no column for the mask before)."""
    scale = STUDY.scales["paper"]
    config, deepspeed = load(scale.config, STUDY.settings("A", scale, 0))
    assert (config.steps, deepspeed["train_batch_size"]) == (30_000, 1024)
    a, b2, d, vr2 = (count_parameters(backbone(row, "paper")).total for row in ("A", "B2", "D", "VR2"))
    assert a == pytest.approx(1.083e9, rel=1e-3)
    assert d - a == pytest.approx(0.1993e9, rel=1e-3)
    assert d - b2 == 28 * (512 + 128 + 32 + 16 + 1)
    assert d - vr2 == pytest.approx(0.2549e9, rel=1e-3)


def test_every_row_builds_on_one_before_it() -> None:
    seen: list[str] = []
    for name, row in STUDY.rows.items():
        assert (row.before is None) == (name == "A") and (row.before is None or row.before in seen)
        assert row.trained_as is None or row.trained_as in seen
        seen.append(name)


# ---- cells ----


@pytest.fixture
def small(data_set: Path, tmp_path: Path) -> list[str]:
    """Words of a study whose cells take a second: one step of a model with three blocks."""
    words = ["model.width=32", "model.heads=2", "model.depth=3", "model.mask_hidden=[8]", "steps=1", "logging.every=1"]
    words += [
        "optimizer.warmup_steps=1",
        f"data.path={data_set}",
        "data.validation=null",
        "preview.steps=1",
        "checkpoint.every=10",
    ]
    words += ["deepspeed.train_batch_size=2", "deepspeed.train_micro_batch_size_per_gpu=2"]
    return ["table3", "--out", str(tmp_path / "study"), "--seeds", "0", "--set", *words]


def test_cells_run_once_and_make_the_table(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real trainings, pruning and evaluation; started again, no command runs."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red circle in the centre on a white background\n")
    command = ["table3", "--rows", "VR3", "prune", "--prompts", str(prompts), *small[1:]]
    ran: list[list[str]] = []

    def run(words: list[str], stdout: Any, **_: Any) -> SimpleNamespace:
        ran.append(words)
        (code,) = ended([fork_command(Path(stdout.name), words)])
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(cells_module.subprocess, "run", run)
    assert main(command) == 0, capsys.readouterr().err
    programs = [words[2] for words in ran]
    assert programs == ["pretrain.train", "pretrain.evaluate", "pretrain.prune", "pretrain.evaluate"]
    said = capsys.readouterr().out
    assert "| VR3 | C + D + shared vocabulary of 3d |" in said and "| prune |" in said
    found = json.loads((tmp_path / "study/prune_0/cell.json").read_text())
    assert {"train loss", "shapes: strict_shapes"} <= found["figures"].keys()
    whole = json.loads((tmp_path / "study/VR3_0/cell.json").read_text())
    ffns = 2 * (2 * 32 * 32 + 32 + 32)  # as many blocks' own experts of d entries as the scale removes, of width 32
    assert whole["parameters"] - found["parameters"] == ffns and found["flops"] < whole["flops"]
    with Image.open(tmp_path / "study/table.png") as image:
        assert image.width > 200
    assert "2 of 2 cells, " in said
    assert main(command) == 0 and len(ran) == 4
    assert "cells, " not in capsys.readouterr().out, "what is done already is no progress"
    assert main([*command, "optimizer.lr=1e-4"]) == 1
    assert "was made with other settings" in capsys.readouterr().err


def test_a_cell_that_fails_leaves_the_others(small: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    def run(cell: Cell, *_: Any) -> None:
        if cell.name == "A":
            raise RuntimeError("A, seed 0: exit code 1; log.txt says why")
        cell.folder.mkdir(parents=True)
        figures = {"row": cell.name, "seed": 0, "settings": cell.settings, "figures": {"train loss": 1.0}}
        costs = {"parameters": 1, "flops": 1.0, "step_s": 1.0, "seconds": 1.0}
        (cell.folder / "cell.json").write_text(json.dumps(figures | costs))

    monkeypatch.setattr(Cell, "run", run)
    assert main(["table3", "--rows", "A", "B2", *small[1:]]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "ablate: A, seed 0: exit code 1; log.txt says why"
    assert (tmp_path / "study/B2_0/cell.json").is_file()


def test_the_list_names_each_cells_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["table3", "--out", str(tmp_path / "x"), "--list", "--processes", "8"]) == 0
    said = capsys.readouterr().out.splitlines()
    numbered = [line for line in said if line[0].isdigit()]
    assert len(numbered) == 3 * len(STUDY.rows) and numbered[0] == "0  A, seed 0: DiT baseline"
    numbers = [int(line.split()[0]) for line in numbered]
    # What is drawn from a training has the training's number: one task of an array does all of it.
    assert numbers[: len(STUDY.rows)] == [*range(9), 8, 8] and set(numbers) == set(range(27))
    assert "torch.distributed.run --nproc-per-node=8 -m pretrain.train demo_256" in said[1]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--scale", "paper"], "--scale paper needs --prompts and --metrics"),
        (["--rows", "A", "Z"], "--rows Z: the rows are A, B1, "),
        (["--jobs", "0"], "--jobs and --processes must be at least 1"),
        (["--cell", "99"], "--cell 99: there are 0 to 26; --list names them"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str, tmp_path: Path, capsys) -> None:
    assert main(["table3", "--out", str(tmp_path / "x"), *words]) == 1
    assert line in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_one_number_does_a_training_and_what_is_drawn_from_it(small: list[str], tmp_path: Path, monkeypatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(Cell, "run", lambda cell, *_: done.append(cell.name))
    monkeypatch.setattr(running, "write", lambda *_: "")
    assert main(["table3", "--cell", "8", *small[1:]]) == 0
    assert done == ["VR3", "skip", "prune"]


# ---- neighbours ----


def test_rows_of_equal_flops_take_more_steps_by_what_a_step_costs_less(tmp_path: Path) -> None:
    scale = NEIGHBOURS.scales["tiny"]
    cells = {row: Cell(NEIGHBOURS, scale, row, 0, tmp_path) for row in NEIGHBOURS.rows}

    def cost(row: str) -> tuple[int, float]:
        config = load(scale.config, cells[row].settings)[0]
        model = config.model.backbone()
        return config.steps, count_flops(model, (8, 8), SHAPES_CAPTION).total

    base_steps, base_flops = cost("baseline")
    for row in ("FlexDiT", "mediators", "FocusDiT", "both"):
        steps, flops = cost(row)
        assert steps == base_steps
        more, same = cost(f"{row}_flops")
        assert same == flops and more * flops == pytest.approx(base_steps * base_flops, rel=0.5 / more)
    assert cost("FlexDiT_flops")[0] > 1.4 * base_steps


# ---- less ----


def less(tmp_path: Path, row: str, seed: int = 0) -> Cell:
    return Cell(LESS, LESS.scales["tiny"], row, seed, tmp_path)


def finish(cell: Cell, step_s: float) -> None:
    cell.folder.mkdir(parents=True)
    (cell.folder / "cell.json").write_text(json.dumps({"settings": cell.settings, "step_s": step_s}))


def test_routing_counts_in_equal_flops(tmp_path: Path) -> None:
    """Nine tenths of the steps compute half of the tokens in blocks 2 to 5, of eight."""
    config = load("demo_256", less(tmp_path, "tread").settings)[0]
    model, grid = config.model.backbone(), (8, 8)
    whole, routed = (
        count_flops(model, grid, SHAPES_CAPTION, routing=r).total for r in (None, config.routing.build(model))
    )
    assert (config.steps, model.depth) == (150, 8) and routed < 0.8 * whole
    mean = 0.1 * whole + 0.9 * routed
    assert less(tmp_path, "tread").forward_flops == pytest.approx(mean)
    assert less(tmp_path, "plain").forward_flops == whole == less(tmp_path, "muon").forward_flops
    assert load("demo_256", less(tmp_path, "tread_flops").settings)[0].steps == round(150 * whole / mean)


def test_alignment_counts_with_the_features_of_the_data(tmp_path: Path, monkeypatch) -> None:
    """Its three linear maps for each of 64 tokens, 128 wide, to features of 48."""
    monkeypatch.chdir(tmp_path)
    Path(DATA).mkdir(parents=True)
    (Path(DATA) / "dataset.json").write_text(json.dumps({"features": {"width": 48}}))
    more = less(tmp_path, "aligned").forward_flops - less(tmp_path, "plain").forward_flops
    assert more == 2 * 64 * (128 * 128 + 128 * 128 + 128 * 48) < 0.05 * less(tmp_path, "plain").forward_flops
    # Of a run, by its own copy of the card: the data set may be in a bucket.
    (tmp_path / "dataset.json").write_text(json.dumps({"features": {"width": 96}}))
    aligned = less(tmp_path, "aligned")
    config = load("demo_256", [*aligned.settings, "data.path=s3://bucket/shapes", "data.cache=/cache"])[0]
    assert forward_flops(aligned.phases(config, tmp_path)) - aligned.forward_flops == 2 * 64 * 128 * 48


def test_equal_seconds_follow_from_the_measured_times_of_the_same_seed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"follow from the time of plain, seed 1: do it first"):
        _ = less(tmp_path, "muon_seconds", seed=1).settings
    finish(less(tmp_path, "plain", seed=1), step_s=0.6)
    with pytest.raises(ValueError, match=r"follow from the time of muon, seed 1: do it first"):
        _ = less(tmp_path, "muon_seconds", seed=1).settings
    finish(less(tmp_path, "muon", seed=1), step_s=0.75)
    assert less(tmp_path, "muon_seconds", seed=1).settings == [*less(tmp_path, "muon", seed=1).settings, "steps=120"]


def test_a_steps_seconds_are_those_of_all_phases() -> None:
    """Nine routed steps of 2 s by their median, and one of 4 s; a phase of which no step was measured takes that of all."""
    measured = {1: 9.0, **dict.fromkeys(range(2, 10), 2.0), 10: 4.0}
    assert mean_step_s(measured, [9, 10]) == pytest.approx(0.9 * 2 + 0.1 * 4)
    assert mean_step_s(measured, [10]) == 2
    assert mean_step_s({5: 2.0}, [9, 10]) == 2


def test_captions_of_photographs_count_at_large(tmp_path: Path) -> None:
    """120 tokens, as everywhere but for shapes; cross-attention over them has its part in what routing spares."""
    config = load("stage1_256", [])[0]
    model = config.model.backbone()
    large = Cell(LESS, LESS.scales["large"], "plain", 0, tmp_path)
    assert large.forward_flops == pytest.approx(count_flops(model, (16, 16), 120).total)


def test_rows_of_equal_seconds_come_after_those_that_time_them(tmp_path: Path, monkeypatch, capsys) -> None:
    def run(cell: Cell, *_: Any) -> None:
        assert cell.settings
        finish(cell, 1.0)

    monkeypatch.setattr(Cell, "run", run)
    for name in ("write", "make_data"):
        monkeypatch.setattr(running, name, lambda *_: "")
    rows = ["muon_seconds", "tread_seconds", "plain", "muon", "--seeds", "0"]
    assert main(["less", "--out", str(tmp_path), "--rows", *rows]) == 1
    found = {path.parent.name for path in tmp_path.glob("*/cell.json")}
    assert found == {"plain_0", "muon_0", "muon_seconds_0"}
    assert capsys.readouterr().err.endswith("follow from the time of tread, seed 0: do it first\n")
    assert main(["less", "--out", str(tmp_path), "--rows", "tread_seconds", "--list"]) == 0
    assert "do it first" in capsys.readouterr().out


# ---- figures ----


@pytest.mark.parametrize(
    ("t", "degrees", "p"), [(12.706, 1, 0.05), (4.3027, 2, 0.05), (2.2281, 10, 0.05), (9.9248, 2, 0.01)]
)
def test_students_p_by_its_table(t: float, degrees: int, p: float) -> None:
    assert student_p(t, degrees) == pytest.approx(p, abs=2e-5) == student_p(-t, degrees)


def test_paired_differences() -> None:
    d = paired([1.0, 2.0, 4.0], [0.0, 1.5, 2.5])
    assert (d.mean, d.sem) == (pytest.approx(1.0), pytest.approx((0.25 / 3) ** 0.5))
    assert d.p == pytest.approx(student_p(1 / (0.25 / 3) ** 0.5, 2))
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert math.isnan(paired([1.0], [2.0]).p) and math.isnan(mean_and_sem([3.0])[1])


def test_the_table_and_its_figure(tmp_path: Path) -> None:
    rows = {"A": Row("plain", None, paper={"FID": 31.29}), "B": Row("other", "A")}
    study = Study("a study", rows, {"tiny": Scale("demo_256", (), seeds=(0, 1), prompts=8, about="", prune=2)})

    def cell(loss: float, step_s: float) -> dict[str, Any]:
        return {"figures": {"loss": loss}, "parameters": 2_500_000, "flops": 4.0, "step_s": step_s}

    cells = {"A": {0: cell(1.0, 2.0), 1: cell(2.0, 2.0)}, "B": {0: cell(0.5, 3.0), 1: cell(1.3, 3.0)}}
    lines = table(study, cells).splitlines()
    assert lines[2] == "| A | plain | 2.50M | 1.00 | 1.00 | 1.5000 ± 0.5000 | 31.29 |"
    assert lines[3] == "| B | other | 2.50M | 1.00 | 1.50 | 0.9000 ± 0.4000 |  |"
    assert lines[-1] == "| B | A | loss | -0.6000 ± 0.1000 | 0.105 | 2 |"
    plot(study, cells, tmp_path / "table.png")
    with Image.open(tmp_path / "table.png") as image:
        assert image.height > 200
    flops = Study("a study", rows | {"C": Row("other", "A", equal="flops")}, study.scales)
    steps = {row: {seed: c | {"steps": 300} for seed, c in seeds.items()} for row, seeds in cells.items()}
    assert table(flops, steps).splitlines()[3] == "| B | other | 2.50M | 1.00 | 1.50 | 300 | 0.9000 ± 0.4000 |  |"


@pytest.mark.parametrize("study", [STUDY, NEIGHBOURS, LESS], ids=lambda study: study.title)
def test_a_study_of_shapes_has_its_presets_shape_whatever_the_demos_recipe_is(study: Study) -> None:
    scale = study.scales["tiny"]
    config = load(scale.config, scale.settings)[0]
    backbone, usual = config.model.backbone(), preset(config.model.preset)
    for name in ("width", "heads", "depth", "patch", "position_scale"):
        assert getattr(backbone, name) == getattr(usual, name), name
    assert (config.data.caption_dropout, config.preview.guidance) == (0.1, 3.0)
