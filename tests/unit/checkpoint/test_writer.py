"""Checkpoints as they are written: complete or not there, in the background from copies; old ones removed; a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint import writer
from pretrain.checkpoint.reader import FOLDER, LATEST, STATE
from pretrain.checkpoint.writer import publish, remove_old

FILE = "rank_00000-of-00001.safetensors"
KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("background", [False, True])
def test_what_is_on_disk(background: bool, make_run) -> None:
    """One file of fp32 partitions, and a description with its bytes and SHA-256; `latest` names the folder."""
    run = make_run(background=background)
    run.train(0, 1)
    run.save(2, pending_sums=[7.0])
    folder = run.folder / FOLDER
    assert names(folder) == [LATEST, "step_00000002"]
    assert (folder / LATEST).read_text() == "step_00000002\n"
    assert names(folder / "step_00000002") == [FILE, STATE]
    state = json.loads((folder / "step_00000002" / STATE).read_text())
    content = (folder / "step_00000002" / FILE).read_bytes()
    assert state["files"] == {FILE: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    assert list(state) == [
        *(
            "format",
            "progress",
            "totals",
            "world",
            "layout",
            "layout_hash",
            "shares",
            "config",
            "data",
            "files",
            "sha256",
        )
    ], "runs that are there already are read by these names"
    assert state["progress"]["updates"] == 2 and state["totals"] == [[7.0]] and state["world"] == 1
    assert state["shares"] == [m.numel() for m in run.engine.masters]
    tensors = load_file(folder / "step_00000002" / FILE)
    expected = {"master": run.engine.masters, **run.ema.partitions, **run.engine.moments()}
    assert tensors.keys() == {f"{kind}.{group}" for kind in KINDS for group in (0, 1)}
    for kind in KINDS:
        for group, partition in enumerate(expected[kind]):
            assert torch.equal(tensors[f"{kind}.{group}"], partition.detach())


def test_training_goes_on_while_a_checkpoint_is_written(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state at `save`, though the weights move before the file is; `report` waits for it."""
    run, go = make_run(background=True), threading.Event()
    save_file = writer.save_file

    def slow(tensors, path):
        assert go.wait(60)
        save_file(tensors, path)

    monkeypatch.setattr(writer, "save_file", slow)
    run.train(0)
    masters = [m.detach().clone() for m in run.engine.masters]
    run.writer.save(writer.RunState(step=1), [])
    run.train(1, 2)
    assert run.writer.report() is None
    assert names(run.folder / FOLDER) == [".writing-step_00000001"]
    go.set()
    run.writer.wait()
    assert run.writer.report() == f"checkpoint {run.folder / FOLDER / 'step_00000001'}"
    assert run.writer.report() is None, "each checkpoint is reported once"
    tensors = load_file(run.folder / FOLDER / "step_00000001" / FILE)
    for group, master in enumerate(masters):
        assert torch.equal(tensors[f"master.{group}"], master)
        assert not torch.equal(run.engine.masters[group].detach(), master)


def test_host_memory_is_kept_for_the_next_checkpoint(make_run) -> None:
    run = make_run(background=True)
    run.save(1)
    places = {name: t.data_ptr() for name, t in run.writer._host_copies.items()}
    run.train(0)
    found = run.save(2)
    assert {name: t.data_ptr() for name, t in run.writer._host_copies.items()} == places
    assert torch.equal(found.parameter("master", "table"), run.engine.masters[1].detach()[:7])


@pytest.mark.parametrize("where", ["save_file", "atomic_write", "publish"])
def test_a_full_disk(where: str, make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the file, the description or the name is written: the one before stays, nothing half-written does."""
    run = make_run(background=False)
    before = run.save(1)
    run.train(0)
    with monkeypatch.context() as patch:
        patch.setattr(writer, where, full_disk)
        run.writer.save(writer.RunState(step=2), [])
    said = "step_00000002 could not be written: process 0: [Errno 28] No space left on device"
    assert run.writer.error is not None and run.writer.error.endswith(said)
    report = run.writer.report()
    assert report is not None and report.startswith("WARNING: ") and said in report
    assert report.endswith("training goes on, the checkpoints before are whole")
    assert names(run.folder / FOLDER) == [LATEST, "step_00000001"]
    before.verify()
    assert run.save(3).path.name == "step_00000003", "there is room again"


def test_a_folder_that_cannot_be_made(make_run) -> None:
    """The error is that of the folder, and no thread is left over."""
    run = make_run(background=True)
    run.folder.mkdir()
    (run.folder / FOLDER).write_text("somebody's file")
    run.writer.save(writer.RunState(step=1), [])
    run.writer.wait()
    assert run.writer.error is not None and "File exists" in run.writer.error


def test_what_a_killed_run_left_is_removed(make_run) -> None:
    run = make_run(background=False)
    leftover = run.folder / FOLDER / ".writing-step_00000009"
    leftover.mkdir(parents=True)
    (leftover / FILE).write_text("half")
    run.save(1)
    assert names(run.folder / FOLDER) == [LATEST, "step_00000001"]


def test_the_same_step_again(make_run) -> None:
    """A run whose `latest` was lost comes to a step that is there: the new one takes its place."""
    run = make_run(background=False)
    run.save(1)
    run.train(0)
    found = run.save(1)
    found.verify()
    assert torch.equal(found.parameter("master", "table"), run.engine.masters[1].detach()[:7])


def test_publish(tmp_path: Path) -> None:
    """The folder has its name before `latest` names it."""
    writing, path = tmp_path / ".writing-x", tmp_path / "step_00000005"
    writing.mkdir()
    (writing / "file").write_text("content")
    publish(writing, path)
    assert names(tmp_path) == [LATEST, "step_00000005"]
    assert (tmp_path / LATEST).read_text() == "step_00000005\n"
    assert (path / "file").read_text() == "content"


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [70]), (2, 0, [60, 70]), (1, 30, [30, 60, 70]), (3, 20, [20, 40, 50, 60, 70]), (9, 0, range(10, 80, 10))],
)
def test_old_ones_are_removed(keep_last: int, keep_every: int, kept, tmp_path: Path) -> None:
    """Folders of other names are not touched."""
    others = ["aside_00000010", "step_mine", "step_000000100"]
    for name in [*(f"step_{step:08d}" for step in range(10, 80, 10)), *others]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_old(tmp_path, keep_last, keep_every)
    assert set(names(tmp_path)) == {*others, *(f"step_{step:08d}" for step in kept)}


def test_one_that_cannot_be_removed_does_not_lose_the_new_one(
    make_run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(background=False, keep_last=2, keep_every=0)
    run.save(1)
    run.save(2)

    def busy(*_: Any) -> None:
        raise OSError("Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "remove_old", busy)
        run.save(3).verify()
    assert "WARNING: an older checkpoint could not be removed: Device or resource busy" in capsys.readouterr().out
    run.save(4)
    assert names(run.folder / FOLDER) == [LATEST, "step_00000003", "step_00000004"]
