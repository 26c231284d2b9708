"""The evaluation's stages: nothing is drawn or judged twice, by any number of processes; what cannot be had is not run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from data_prep.shapes import draw, scenes
from pretrain.evaluate.__main__ import main
from pretrain.evaluate.metric import NotRun, Result, Value
from pretrain.evaluate.metrics import METRICS
from pretrain.evaluate.plots import plot_results
from pretrain.sampling import drawing

SETTINGS = ("--steps", "2", "--height", "64", "--width", "64", "--batch-size", "2")


class Counting:
    """A metric that writes down what it judges: the mean brightness."""

    def __init__(self) -> None:
        self.judged: list[str] = []
        self.stop_after: int | None = None
        self.missing: str | None = None
        self.identity, self.batch = {"version": 1}, 2

    def arguments(self, parser: Any) -> None:
        pass

    def check_prompts(self, args: Any) -> None:
        pass

    def build(self, args: Any, device: Any) -> Counting:
        if self.missing:
            raise NotRun(self.missing)
        return self

    def score(self, pictures: Any) -> list[dict[str, float]]:
        if self.stop_after is not None and len(self.judged) >= self.stop_after:
            raise KeyboardInterrupt
        self.judged += [p.path.name for p in pictures]
        return [{"brightness": sum(p.open().convert("L").resize((1, 1)).tobytes()) / 255} for p in pictures]

    def summarise(self, pictures: Any, records: Any) -> Result:
        return Result({"brightness": Value.mean([r["brightness"] for r in records])})


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    metric = Counting()
    monkeypatch.setitem(METRICS, "counting", lambda: metric)
    return metric


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{s.caption}\n" for s in scenes(5, 1)))
    return path


def result(out: Path, metric: str = "counting") -> dict[str, Any]:
    return json.loads((out / f"{metric}.json").read_text())


def words(source: str, folder: Path, prompts: Path | None, out: Path, *more: str) -> list[str]:
    return [source, str(folder), *(("--prompts", str(prompts)) if prompts else ()), "--out", str(out), *more]


# ---- drawing and judging ----


def test_a_model_is_drawn_and_judged_once(
    tiny_pipeline_folder: Path, prompts: Path, tmp_path: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, one after the other, the first killed in between and started again: each picture once."""
    drawn: list[int] = []
    draw_batch = drawing.draw_batch
    monkeypatch.setattr(
        drawing, "draw_batch", lambda p, jobs, args: (drawn.extend(j.index for j in jobs), draw_batch(p, jobs, args))[1]
    )
    command = words("--model", tiny_pipeline_folder, prompts, tmp_path / "out", "--metrics", "counting", *SETTINGS)
    command += ["--per-prompt", "2"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    counting.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        main(command)
    counting.stop_after = None
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert main(command) == 0
    assert sorted(drawn) == list(range(10)) and len(counting.judged) == len(set(counting.judged)) == 10
    found = result(tmp_path / "out")
    assert found["status"] == "done" and found["values"]["brightness"]["count"] == 10
    assert found["pictures"]["seeds"] == [0, 9] and found["pictures"]["steps"] == 2
    assert found["pictures"]["model"] == str(tiny_pipeline_folder)

    monkeypatch.delenv("WORLD_SIZE"), monkeypatch.delenv("RANK")
    before = (tmp_path / "out" / "counting.json").read_text()
    assert main(command) == 0
    assert len(drawn) == len(counting.judged) == 10
    assert json.loads(before)["values"] == result(tmp_path / "out")["values"]


def test_processes_that_draw_and_judge_beside_each_other_leave_nothing(
    tiny_pipeline_folder: Path,
    prompts: Path,
    tmp_path: Path,
    counting: Counting,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    """The first of two judges by all metrics, though the second has drawn nothing before it ends; the second sums up."""
    other = Counting()
    monkeypatch.setitem(METRICS, "other", lambda: other)
    command = words(
        "--model", tiny_pipeline_folder, prompts, tmp_path / "out", "--metrics", "counting", "other", *SETTINGS
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    second: list[int] = []

    def beside(pictures: Any) -> list[dict[str, float]]:
        """While the first judges its last pictures, the second draws and judges all of its own."""
        found = Counting.score(counting, pictures)
        if not second:
            second.append(1)
            monkeypatch.setenv("RANK", "1")
            second.append(main(command))
            monkeypatch.setenv("RANK", "0")
        return found

    monkeypatch.setattr(counting, "score", beside)
    monkeypatch.setattr(counting, "batch", 5)
    monkeypatch.setenv("RANK", "0")
    assert main(command) == 0 and second == [1, 0]
    assert len(counting.judged) == len(set(counting.judged)) == len(set(other.judged)) == len(other.judged) == 5
    assert result(tmp_path / "out")["values"]["brightness"]["count"] == 5
    assert result(tmp_path / "out", "other")["values"]["brightness"]["count"] == 5
    first_line, *table = capsys.readouterr().out.split("\n| metric |")
    assert "counting, other: pictures are left to other processes" in first_line and len(table) == 1


def test_pictures_of_a_folder_give_the_same_figures(
    tiny_pipeline_folder: Path, prompts: Path, tmp_path: Path, counting: Counting
) -> None:
    command = words("--model", tiny_pipeline_folder, prompts, tmp_path / "a", "--metrics", "counting", *SETTINGS)
    assert main(command) == 0
    assert main(words("--pictures", tmp_path / "a/pictures", None, tmp_path / "b", "--metrics", "counting")) == 0
    assert result(tmp_path / "a")["values"] == result(tmp_path / "b")["values"]
    assert result(tmp_path / "a")["pictures"]["sha256"] == result(tmp_path / "b")["pictures"]["sha256"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


def test_another_scorer_or_picture_is_judged_anew(folder: Path, tmp_path: Path, counting: Counting) -> None:
    command = words("--pictures", folder, None, tmp_path / "out", "--metrics", "counting")
    assert main(command) == 0
    Image.new("RGB", (8, 8), "white").save(folder / "2.png")
    assert main(command) == 0
    assert counting.judged[4:] == ["2.png"]
    counting.identity = {"version": 2}
    assert main(command) == 0
    assert counting.judged[5:] == ["0.png", "1.png", "2.png", "3.png"]


def test_a_line_that_a_kill_cut_off_is_judged_again(folder: Path, tmp_path: Path, counting: Counting) -> None:
    command = words("--pictures", folder, None, tmp_path / "out", "--metrics", "counting")
    assert main(command) == 0
    (path,) = (tmp_path / "out/records").rglob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    assert main(command) == 0
    assert counting.judged[4:] == ["3.png"]
    assert main(command) == 0 and len(counting.judged) == 5


# ---- what is said ----


def test_what_cannot_be_had_is_not_run(tmp_path: Path, counting: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    counting.missing = "no weights: give --counting-model FOLDER"
    assert main(words("--pictures", tmp_path, None, tmp_path / "out", "--metrics", "counting")) == 0
    assert "| counting | not run: no weights: give --counting-model FOLDER |" in capsys.readouterr().out
    found = result(tmp_path / "out")
    assert found["status"] == "not run" and "values" not in found


def test_a_metric_that_fails_leaves_the_others(
    tmp_path: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    failing = SimpleNamespace(
        arguments=lambda p: None, check_prompts=lambda args: None, build=lambda args, device: raising()
    )
    monkeypatch.setitem(METRICS, "failing", lambda: failing)

    def raising() -> None:
        raise ValueError("no endpoint answers")

    assert main(words("--pictures", tmp_path, None, tmp_path / "out", "--metrics", "failing", "counting")) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "evaluate: failing: no endpoint answers"
    assert "| counting | brightness | 0.0000 |" in said.out


def test_prompts_that_no_metric_takes_are_told_before_anything_is_drawn(
    tmp_path: Path, counting: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cup of coffee on a wooden table")
    asked = words("--run", tmp_path / "no_run", prompts, tmp_path / "out")  # a run that is not there is not looked for
    assert main([*asked, "--metrics", "shapes", "geneval", "dpg"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and not (tmp_path / "out").exists()
    (line,) = said.err.splitlines()
    assert line.startswith(
        "evaluate: shapes: no caption of a scene of shapes: 'a cup of coffee on a wooden table'; such as"
    )
    assert "; geneval: the prompt 'a cup of coffee on a wooden table' is no line of GenEval" in line
    assert "; dpg: the prompt 'a cup of coffee on a wooden table'" in line
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    asked = words("--pictures", tmp_path, prompts, tmp_path / "out")
    assert main([*asked, "--metrics", "shapes", "counting"]) == 1
    assert "| counting | brightness |" in capsys.readouterr().out, "the other metrics go on"


def test_results_of_other_pictures_are_named_not_shown(
    tmp_path: Path, counting: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    prompts = tmp_path / "prompts.txt"
    (scene,) = scenes(1, 1)
    prompts.write_text(scene.caption)
    assert main(words("--pictures", tmp_path, prompts, tmp_path / "out", "--metrics", "shapes", "counting")) == 0
    draw(scene, 64).save(tmp_path / "0.png")
    capsys.readouterr()
    assert main(words("--pictures", tmp_path, prompts, tmp_path / "out", "--metrics", "shapes")) == 0
    said = capsys.readouterr().out
    assert "| shapes | colours | 1.0000 |" in said
    assert "Of other pictures, and not shown: counting. Repeat them with --metrics counting." in said
    assert (tmp_path / "out/table.md").read_text() == said


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["--pictures", "nowhere"], "--pictures nowhere: no such folder"),
        (["--pictures", "empty"], "--pictures empty: holds no pictures (.png, .jpg, .jpeg, .webp)"),
        (["--pictures", "two", "--prompts", "one.txt"], "two holds 2 pictures, but one.txt asks for 1 (1 a prompt)"),
        (["--pictures", "two", "--prompts", "bad.jsonl"], 'bad.jsonl: prompt 1 must be an object with a "prompt"'),
        (["--pictures", "two", "--prompts", "worse.jsonl"], "worse.jsonl: prompt 1 is no JSON"),
        (["--pictures", "two", "--prompts", "none.txt"], "none.txt holds no prompts"),
        (["--pictures", "cut"], "cut/0.png cannot be read as a picture"),
        (["--pictures", "two", "--per-prompt", "0"], "--per-prompt 0: must be at least 1"),
        (["--model", "x"], "--prompts: needed to draw pictures"),
    ],
)
def test_mistakes_are_one_line(
    command: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counting: Counting,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, count in (("empty", 0), ("two", 2), ("cut", 1)):
        Path(folder).mkdir()
        for i in range(count):
            Image.effect_noise((32, 32), 50).save(f"{folder}/{i}.png")
    Path("cut/0.png").write_bytes(Path("cut/0.png").read_bytes()[:200])
    for name, text in (("one.txt", "a"), ("bad.jsonl", "[1]"), ("worse.jsonl", "{"), ("none.txt", "\n")):
        Path(name).write_text(text)
    assert main([*command, "--metrics", "counting", "--out", "out"]) == 1
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert line in said and said.startswith("evaluate: ")


def test_a_mean_has_its_standard_error() -> None:
    value = Value.mean([1.0, 2.0, 4.0])
    assert (value.value, value.count) == (pytest.approx(7 / 3), 3)
    assert value.sem == pytest.approx((((16 + 1 + 25) / 9) / 2 / 3) ** 0.5)
    assert Value.mean([1.0]).sem is None


def test_results_are_plotted(tmp_path: Path, counting: Counting) -> None:
    for i in range(3):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    assert main(words("--pictures", tmp_path, None, tmp_path / "out", "--metrics", "counting")) == 0
    (panel,) = plot_results([result(tmp_path / "out")]).axes
    (bar,) = panel.patches
    value = result(tmp_path / "out")["values"]["brightness"]
    assert bar.get_width() == value["value"]
    assert [t.get_text().split() for t in panel.texts] == [[f"{value['value']:.4g}", "±", f"{value['sem']:.2g}"]]
    with Image.open(tmp_path / "out/results.png") as plot:
        assert plot.width > 500
