"""pretrain.compare.reference: bands recomputed by a plain loop, verdicts on made runs, and the demo's own reference."""

from __future__ import annotations

import math
import random
from pathlib import Path
from statistics import mean, variance

import pytest
from PIL import Image
from support import ROOT
from torch.utils.tensorboard import SummaryWriter

from pretrain import demo
from pretrain.compare.reference import CURVES, PARTS, WIDTH, check, main, read
from pretrain.config import load

STEPS, RUNS, LOSS = 160, 3, "train/loss"


def make(folder: Path, seed: int, steps: int = STEPS, **changed: float) -> Path:
    """A run whose loss is 1/√step with noise of 2%, and its other curves likewise; `changed` has values by step: s40=nan."""
    rng = random.Random(seed)
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for tag in CURVES:
            for step in range(10, steps + 1, 10):
                value = rng.gauss(1, 0.02) / math.sqrt(step)
                writer.add_scalar(tag, changed.get(f"s{step}", value) if tag == LOSS else value, step)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    runs = [str(make(folder / f"seed_{seed}", seed)) for seed in range(RUNS)]
    assert main(["make", str(folder / "made" / "demo.csv"), *runs]) == 0
    return folder / "made" / "demo.csv"


def test_the_file_and_its_picture(made: Path) -> None:
    head, *rows = made.read_text().splitlines()
    assert head == "curve,step,seed_0,seed_1,seed_2"
    assert len(rows) == len(CURVES) * STEPS // 10
    assert rows[0].startswith("train/loss,10,0.")
    assert Image.open(made.with_suffix(".png")).width > 1000


def test_the_band_by_a_plain_loop(made: Path) -> None:
    rows = [row.split(",") for row in made.read_text().splitlines() if row.startswith(f"{LOSS},")]
    of_parts = []
    for part in range(PARTS):
        inside = [row for row in rows if part * STEPS / PARTS < int(row[1]) <= (part + 1) * STEPS / PARTS]
        of_parts.append([mean(float(row[2 + run]) for row in inside) for run in range(RUNS)])
    spread = math.sqrt(mean(variance(m) / mean(m) ** 2 for m in of_parts))
    for band, means in zip(read(made).band(LOSS), of_parts, strict=True):
        assert band.mean == pytest.approx(mean(means))
        assert band.low == pytest.approx(mean(means) * (1 - WIDTH * spread * math.sqrt(4 / 3)))
        assert band.high == pytest.approx(mean(means) * (1 + WIDTH * spread * math.sqrt(4 / 3)))


def test_a_run_like_them(made: Path, tmp_path: Path) -> None:
    assert check(made, make(tmp_path / "run", 7)) == [f"{tag}: as in other runs, to the end" for tag in CURVES]


def test_a_run_that_goes_on_is_judged_as_far_as_it_came(made: Path, tmp_path: Path) -> None:
    assert check(made, make(tmp_path / "half", 7, steps=90))[0] == f"{LOSS}: as in other runs, up to step 80"
    assert check(made, make(tmp_path / "begun", 7, steps=10))[0] == f"{LOSS}: not far enough to say"


@pytest.mark.parametrize(("step", "value", "said"), [(50, 0.5, "0.3"), (160, 0.01, "0.0"), (50, math.nan, "nan")])
def test_a_run_unlike_them(made: Path, tmp_path: Path, step: int, value: float, said: str) -> None:
    line = check(made, make(tmp_path / "run", 7, **{f"s{step}": value}))[0]
    first = (step - 1) // 20 * 20 + 1
    assert line.startswith(f"{LOSS}: {said}") and f" in steps {first} to {first + 19}, where 0." in line, line
    assert ";" not in line  # the other parts are within


def test_a_run_with_fewer_points_is_judged_by_those(made: Path, tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        writer.add_scalar(LOSS, 0.3, 50)  # of steps 41 to 60 alone
        writer.add_scalar(LOSS, 1 / math.sqrt(150), 160)
    (line, *_) = check(made, tmp_path)
    assert line.startswith(f"{LOSS}: 0.3 in steps 41 to 60, where ") and ";" not in line, line


def test_a_curve_that_the_run_lacks(made: Path, tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        writer.add_scalar(LOSS, 0.3, 10)
    assert check(made, tmp_path)[1:] == [f"{tag}: not recorded in this run" for tag in CURVES[1:]]


def test_refusals(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = str(make(tmp_path / "run", 1)), str(make(tmp_path / "other", 2, s50=math.inf))
    for args, words in [
        (["make", "r.csv", run], "two different run directories"),
        (["make", "r.csv", run, run], "two different run directories"),
        (["make", "r.csv", run, str(tmp_path / "nothing")], "no step of train/loss in common"),
        (["make", "r.csv", run, other], f"{other}: train/loss is not finite"),
        (["check", str(made), str(tmp_path / "nothing")], "has none of the curves"),
        (["check", str(tmp_path / "no.csv"), run], "No such file"),
    ]:
        assert main(args) == 1
        assert words in capsys.readouterr().err, args
    (tmp_path / "binary.csv").write_bytes(b"\xff\x00")
    assert main(["check", str(tmp_path / "binary.csv"), run]) == 1
    assert f"{tmp_path / 'binary.csv'}: no reference" in capsys.readouterr().err
    text = made.read_text()
    for damaged, words in [
        ("", "no reference"),
        (text.replace("train/loss,20,", "train/loss,twenty,"), "line 3"),
        (text.rstrip() + ",0.1\n", f"line {len(text.splitlines())}"),
    ]:
        (tmp_path / "damaged.csv").write_text(damaged)
        assert main(["check", str(tmp_path / "damaged.csv"), run]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("stage", demo.STAGES)
def test_the_demos_reference_is_of_its_config(stage: str) -> None:
    reference, config = read(ROOT / demo.REFERENCE / f"{stage}.csv"), load(stage, [])[0]
    assert len(reference.runs) >= 3 and set(reference.curves) == set(CURVES)
    assert all(max(values) == config.steps for values in reference.curves.values())
    assert (ROOT / demo.REFERENCE / f"{stage}.png").is_file()
