"""Event files and metrics.jsonl read back: panels, text, and points after a resume, a kill, and on a full disk."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from support import scalars
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from pretrain.monitoring.curve_writer import METRICS, CurveWriter
from pretrain.monitoring.panels import PANELS

ABOUT = {"config": "steps: 20\nseed: 0\n"}


def lines(run_dir: Path) -> list[dict[str, object]]:
    """metrics.jsonl without the times."""
    found = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    assert all(abs(line.pop("time") - time.time()) < 600 for line in found)
    return found


def test_panels_and_text_are_there_once_for_each_start_that_counts(tmp_path: Path) -> None:
    for start, steps in ((0, [1]), (0, [1]), (4, [1, 5]), (4, [1, 5]), (2, [1, 3])):
        writer = CurveWriter(tmp_path, ABOUT, writes=True)
        writer.resume(start)
        writer.scalars({"train/loss": float(start)}, start + 2)
        writer.close()
        time.sleep(1)  # event files are read in the order of the seconds in their names
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        layouts = events.Tensors("custom_scalars__config__")
        layout = Layout()
        layout.ParseFromString(layouts[-1].tensor_proto.string_val[0])
        assert [e.step for e in layouts] == steps
        charts = {c.title: {p.title: list(p.multiline.tag) for p in c.chart} for c in layout.category}
        assert charts == PANELS
        assert list(charts) == ["health", "speed", "masks", "samples", "data"]
        texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("config/text_summary")]
        assert texts == ["    steps: 20\n    seed: 0\n"] * len(steps)


def test_lines_are_the_points_and_a_resume_drops_later_ones(tmp_path: Path) -> None:
    writer = CurveWriter(tmp_path, ABOUT, writes=True)
    writer.resume(0)
    for step in (2, 4, 6):
        writer.scalars({"train/loss": 1 / step, "speed/step_s": 0.5}, step)
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]
    time.sleep(1)
    writer.resume(4)
    writer.scalars({"train/loss": 0.125}, 6)
    writer.close()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [2, 4, 6]
    assert found[0] == {"step": 2, "train/loss": 0.5, "speed/step_s": 0.5}
    assert scalars(tmp_path, "train/loss") == {line["step"]: line["train/loss"] for line in found}
    writer.resume(0)
    assert lines(tmp_path) == []


def test_a_line_that_a_kill_left_incomplete_is_dropped(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 2, "time": 0}\n{"step": 4, "ti')
    writer = CurveWriter(tmp_path, ABOUT, writes=True)
    writer.resume(4)
    writer.close()
    assert (tmp_path / METRICS).read_text() == '{"step": 2, "time": 0}\n'


def test_what_is_not_finite_is_a_string_in_lines_that_any_reader_of_json_takes(tmp_path: Path) -> None:
    writer = CurveWriter(tmp_path, ABOUT, writes=True)
    writer.resume(0)
    writer.scalars({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}, 2)
    writer.close()
    assert lines(tmp_path) == [{"step": 2, "a": "nan", "b": "inf", "c": "-inf", "d": 1.5}]
    assert math.isnan(scalars(tmp_path, "a")[2]) and scalars(tmp_path, "b")[2] == math.inf


def test_a_full_disk_loses_whole_lines(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes a part of the second line."""
    writer = CurveWriter(tmp_path, ABOUT, writes=True)
    writer.resume(0)
    writer.scalars({"a": 1.0}, 2)

    opened = Path.open

    def full(path: Path, mode: str = "r") -> object:
        file = opened(path, mode)
        if path.name == METRICS:
            write = file.write

            def a_part(line: str) -> None:
                write(line[:9])
                raise OSError("full")

            monkeypatch.setattr(file, "write", a_part)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        writer.scalars({"a": 2.0}, 4)
    assert f"WARNING: {tmp_path / METRICS} cannot be written (full)" in capsys.readouterr().out
    writer.scalars({"a": 3.0}, 6)
    writer.close()
    assert lines(tmp_path) == [{"step": 2, "a": 1.0}, {"step": 6, "a": 3.0}]
