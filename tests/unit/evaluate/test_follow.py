"""A run's checkpoints evaluated: one of a step, and all of a training as they come, of which nothing is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import EARLIER, contents, scalars

from data_prep.shapes import scenes
from pretrain.checkpoint.reader import STATE, step_name, with_hash
from pretrain.evaluate import evaluation, follow
from pretrain.evaluate.__main__ import main

pytestmark = pytest.mark.usefixtures("earlier_preset", "one_thread")

LAST = 9


def appear(run: Path, step: int) -> None:
    """A checkpoint of this step, as training leaves it."""
    folder = run / "checkpoints" / step_name(step)
    shutil.copytree(EARLIER / "run/checkpoints" / step_name(3), folder)
    state = json.loads((folder / STATE).read_text())
    del state["sha256"]
    state["progress"]["step"] = step
    (folder / STATE).write_text(with_hash(state))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of LAST steps that stands at step 3."""
    run = tmp_path / "runs/one"
    shutil.copytree(EARLIER / "run", run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("\nsteps: 3\n", f"\nsteps: {LAST}\n"))
    return run


@pytest.fixture
def command(run: Path, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{s.caption}\n" for s in scenes(2, 1)))
    words = ["--run", str(run), "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--metrics", "shapes"]
    return [*words, "--steps", "2", "--height", "64", "--width", "64"]


def as_time_passes(monkeypatch: pytest.MonkeyPatch, *events: Callable[[], Any]) -> None:
    """One event while each pause lasts; a pause beyond them is an error."""
    left = list(events)
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: left.pop(0)())


def test_each_checkpoint_is_evaluated_once_until_the_training_is_complete(
    run: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 4 is no multiple; step 6 is removed once it was seen; step 9 is the last."""
    evaluated: list[int] = []
    evaluate = evaluation.run

    def evaluate_late(args: Any) -> str:
        evaluated.append(args.step)
        if args.step == 6:
            shutil.rmtree(run / "checkpoints" / step_name(6))
        return evaluate(args)

    monkeypatch.setattr(evaluation, "run", evaluate_late)
    as_time_passes(
        monkeypatch,
        lambda: None,
        lambda: (appear(run, 4), appear(run, 6)),
        lambda: appear(run, LAST),
    )
    before = contents(run)
    assert main([*command, "--every", "3", "--poll", "5"]) == 0
    said = capsys.readouterr()
    assert evaluated == [3, 6, 9]
    assert f"{run} is complete at step 9: 2 checkpoints evaluated now" in said.out
    assert "step 6: the training has removed this checkpoint; it is left out" in said.err.splitlines()
    for step in (3, 9):
        found = json.loads((tmp_path / "out" / step_name(step) / "shapes.json").read_text())
        assert (found["status"], found["pictures"]["step"], found["pictures"]["count"]) == ("done", step, 2)
    assert not (tmp_path / "out" / step_name(6) / "shapes.json").exists()
    assert [*scalars(run / "evaluate", "evaluate/shapes/tasks")] == [3, 9]
    assert {name: content for name, content in contents(run).items() if name in before} == before
    new = {Path(name).parts[0] for name in contents(run).keys() - before.keys()}
    assert new == {"checkpoints", "evaluate"}  # checkpoints: those that appeared

    assert main([*command, "--every", "3"]) == 0  # again: nothing is left to do
    assert evaluated == [3, 6, 9] and "0 checkpoints evaluated now" in capsys.readouterr().out


def test_a_step_is_chosen_and_its_curve_is_written_once(
    run: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    appear(run, 6)
    assert main([*command, "--step", "3"]) == 0
    first = contents(run)
    assert main([*command, "--step", "3", "--run", run.name]) == 0  # by its name under runs/
    assert contents(run) == first
    figures = json.loads((tmp_path / "out/shapes.json").read_text())
    assert figures["pictures"]["step"] == 3
    for name, value in figures["values"].items():
        assert scalars(run / "evaluate", f"evaluate/shapes/{name}") == {3: pytest.approx(value["value"], nan_ok=True)}
    capsys.readouterr()
    assert main([*command, "--step", "5"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"evaluate: {run} has no checkpoint of step 5; the steps of those that it has: 3, 6"
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--every", "4"], "--every 4: {run} has checkpoint.every=3; give a multiple of that"),
        (["--every", "0"], "--every 0 --poll 30: must be at least 1, and above 0"),
        (["--every", "3", "--step", "3"], "--every and --step: give one of them"),
        (["--every", "3", "--run", "nowhere"], "no run at nowhere or runs/nowhere: a run directory holds config.yaml"),
        (["--every", "3", "--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], line: str, run: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *words]) == 1
    assert line.format(run=run) in capsys.readouterr().err.splitlines()[-1]


def test_pictures_are_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--pictures", str(tmp_path), "--metrics", "shapes", "--out", str(tmp_path)]
    assert main([*words, "--every", "3"]) == 1
    assert "--every: follows the training of --run; give --run" in capsys.readouterr().err
    assert main([*words, "--step", "3"]) == 1
    assert "--step: a checkpoint of --run; give --run" in capsys.readouterr().err
