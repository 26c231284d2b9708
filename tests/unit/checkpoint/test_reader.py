"""Checkpoints as they are read: every flipped byte noticed, the newest intact one found, parameters from any partitions."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pretrain.checkpoint import reader
from pretrain.checkpoint.reader import (
    FOLDER,
    LATEST,
    STATE,
    Checkpoint,
    DamagedCheckpoint,
    config_changes,
    find_run,
    newest,
    newest_intact,
    set_aside_later,
    with_hash,
)
from pretrain.distributed.world import World
from pretrain.state import DataPosition

FILE = "rank_00000-of-00001.safetensors"
ALONE = World.alone()


def flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


# ---- one checkpoint ----


def test_what_was_written_is_read(make_run) -> None:
    run = make_run()
    run.train(0, 1)
    found = run.save(2)
    found.verify()
    state = found.run_state
    assert (state.step, state.updates, state.images, state.position) == (2, 2, 8, DataPosition(1, 2))
    assert state.history.losses == (1.0, 0.5) and state.history.groups == (0, 1) and state.history.rollbacks == 1
    assert found.slots == {slot.name: slot for slot in run.engine.slots}
    partitions = {"master": run.engine.masters, **run.ema.partitions, **run.engine.moments()}
    assert found.weights() == ["master", "ema"]
    for kind, values in partitions.items():
        parameters = found.parameters(kind)
        assert list(parameters) == [slot.name for slot in run.engine.slots]
        for slot in run.engine.slots:
            expected = values[slot.group].detach()[slot.offset : slot.offset + slot.numel].reshape(slot.shape)
            assert torch.equal(parameters[slot.name], expected)


def test_every_flipped_byte_of_the_tensors_is_noticed(make_run) -> None:
    found, chance = make_run().save(1), random.Random(0)
    path = found.path / FILE
    for at in range(path.stat().st_size):
        bit = chance.randrange(8)
        flip(path, at, bit)
        with pytest.raises(DamagedCheckpoint, match=f"{path} is damaged: its hash is not the recorded one; remove "):
            found.verify()
        flip(path, at, bit)
    found.verify()


def test_every_flipped_byte_of_the_description_is_noticed(make_run) -> None:
    """No position, counter or layout is read from it."""
    found, chance = make_run().save(1), random.Random(0)
    path = found.path / STATE
    for at in range(path.stat().st_size):
        bit = chance.randrange(8)
        flip(path, at, bit)
        with pytest.raises(ValueError, match=STATE + "|is of another version"):
            Checkpoint(found.path)
        flip(path, at, bit)
    Checkpoint(found.path)


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_a_file_that_is_cut_off_or_gone(cut: int, make_run) -> None:
    found = make_run().save(1)
    path = found.path / FILE
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size - 1 - cut])
    with pytest.raises(DamagedCheckpoint, match=f"{size - 1 - cut} bytes, expected {size}; remove {found.path}"):
        found.verify()
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{path} is missing; remove {found.path} to use the one before"):
        found.verify()
    found.verify(slice(1, None, 2))  # another process's part


def test_another_format_is_no_damage(tmp_path: Path) -> None:
    """Nothing tells to remove it."""
    (tmp_path / STATE).write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="is of another version; this one reads format 2") as raised:
        Checkpoint(tmp_path)
    assert not isinstance(raised.value, DamagedCheckpoint)


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"format": 2, "sha256": "0"}'])
def test_a_description_that_says_nothing(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / STATE).write_text(content)
    with pytest.raises(DamagedCheckpoint, match=STATE):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
def test_parameters_from_the_partitions_of_any_number_of_processes(processes: int, make_run, tmp_path: Path) -> None:
    """The same flat buffers, cut into partitions of another size."""
    run = make_run()
    run.train(0)
    one = run.save(1)
    folder, files = tmp_path / "several", {}
    folder.mkdir()
    flats = {f"{kind}.{g}": one._file(0).get_tensor(f"{kind}.{g}") for kind in ("master", "ema") for g in (0, 1)}
    sizes = [-(-flats[f"master.{g}"].numel() // processes) for g in (0, 1)]
    for rank in range(processes):
        name = reader.file_name(rank, processes)
        parts = {}
        for key, flat in flats.items():
            size = sizes[int(key[-1])]
            padded = torch.nn.functional.pad(flat, (0, processes * size - flat.numel()))
            parts[key] = padded[rank * size : (rank + 1) * size].clone()
        save_file(parts, folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": reader.sha256(folder / name)}
    state = {k: v for k, v in one.state.items() if k != "sha256"} | {
        "world": processes,
        "shares": sizes,
        "files": files,
    }
    (folder / STATE).write_text(with_hash(state))
    several = Checkpoint(folder)
    several.verify()
    for kind in ("master", "ema"):
        for name, value in several.parameters(kind).items():
            assert torch.equal(value, one.parameter(kind, name)), (kind, name)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_totals_add_up_over_any_number_of_processes(processes: int, make_run) -> None:
    found = make_run().save(1)
    found.state["totals"] = [[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]  # of three
    cpu = torch.device("cpu")
    parts = [found.pending_sums(World(rank, processes, cpu)) for rank in range(processes)]
    assert [sum(column) for column in zip(*filter(None, parts), strict=True)] == [7.0, 70.0]
    assert sum(not part for part in parts) == max(0, processes - 3)


# ---- the newest ----


def test_newest(make_run) -> None:
    """The one that `latest` names; without it, or where it names none, the newest complete one."""
    run = make_run(keep_last=5)
    assert newest(run.folder) is None
    for step in (1, 2, 3):
        run.save(step)
    latest = run.folder / FOLDER / LATEST
    for text, name in (
        ("step_00000002\n", "step_00000002"),
        ("step_00000009\n", "step_00000003"),
        ("", "step_00000003"),
        (None, "step_00000003"),
    ):
        latest.unlink(missing_ok=True)
        if text is not None:
            latest.write_text(text)
        found = newest(run.folder)
        assert found is not None and found.path.name == name
    (run.folder / FOLDER / "step_00000003" / STATE).unlink()
    found = newest(run.folder)
    assert found is not None and found.path.name == "step_00000002"


def test_latest_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / LATEST).write_text("step_00000004\n")
    with pytest.raises(ValueError, match=r"names step_00000004, but .* holds no complete checkpoint"):
        newest(tmp_path)


def test_newest_intact_passes_over_damaged_ones(make_run) -> None:
    run, warnings = make_run(keep_last=5), list[str]()
    for step in (1, 2, 3):
        run.save(step)
    folder = run.folder / FOLDER
    flip(folder / "step_00000003" / FILE, 500, 1)
    (folder / "step_00000002" / STATE).unlink()
    found = newest_intact(run.folder, ALONE, warnings.append)
    assert found is not None and found.path.name == "step_00000001"
    assert len(warnings) == 2 and all(w.startswith("WARNING: ") for w in warnings)
    assert all(w.endswith("; taking the one before") and "; remove" not in w for w in warnings)
    assert f"{folder / 'step_00000003' / FILE} is damaged" in warnings[0]
    flip(folder / "step_00000001" / FILE, 500, 1)
    with pytest.raises(ValueError, match=r"no checkpoint can be used:\n.*step_00000003.*\n.*00002.*\n.*00001"):
        newest_intact(run.folder, ALONE, warnings.append)


def test_newest_intact_of_those_that_are_accepted(make_run) -> None:
    run, warnings = make_run(keep_last=5), list[str]()
    for step in (1, 2, 3):
        run.save(step)
    found = newest_intact(run.folder, ALONE, warnings.append, lambda c: c.run_state.step < 3)
    assert found is not None and found.run_state.step == 2 and not warnings
    with pytest.raises(ValueError, match=r"no checkpoint can be used:\n.*is from amid the skipped steps"):
        newest_intact(run.folder, ALONE, warnings.append, lambda _: False)


def test_newest_intact_of_a_run_that_never_was_one(tmp_path: Path) -> None:
    """A `latest` without checkpoints is not a fresh start."""
    assert newest_intact(tmp_path, ALONE, print) is None
    (tmp_path / FOLDER).mkdir()
    assert newest_intact(tmp_path, ALONE, print) is None
    (tmp_path / FOLDER / LATEST).write_text("step_00000004\n")
    with pytest.raises(ValueError, match="no checkpoint can be used"):
        newest_intact(tmp_path, ALONE, print)


def test_later_ones_are_set_aside(make_run) -> None:
    run = make_run(keep_last=5)
    for step in (1, 2, 3):
        run.save(step)
    folder = run.folder / FOLDER
    (folder / "aside_00000003").mkdir()  # of an earlier rollback
    set_aside_later(run.folder, 1, ALONE)
    assert sorted(p.name for p in folder.iterdir()) == ["aside_00000002", "aside_00000003", LATEST, "step_00000001"]
    assert (folder / LATEST).read_text() == "step_00000001\n"
    Checkpoint(folder / "aside_00000003").verify()
    set_aside_later(run.folder, 1, ALONE)
    assert newest(run.folder).run_state.step == 1  # type: ignore[union-attr]


# ---- names and differences ----


def test_find_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/one" / FOLDER).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_run("one") == Path("runs/one")
    assert find_run(str(tmp_path / "runs/one")) == tmp_path / "runs/one"
    with pytest.raises(FileNotFoundError, match=r"no run at two or runs/two: .*train it first"):
        find_run("two")
    (tmp_path / "runs/one" / FOLDER / "step_00000012").mkdir()
    (tmp_path / "runs/one/config.yaml").touch()
    for inside in (FOLDER, f"{FOLDER}/step_00000012", "config.yaml"):
        with pytest.raises(FileNotFoundError, match=rf"no run at one/{inside} or .*; did you mean runs/one\?$"):
            find_run(f"one/{inside}")
    with pytest.raises(FileNotFoundError, match=rf"no run at {tmp_path}/two: a run directory"):
        find_run(f"{tmp_path}/two")


def test_config_changes() -> None:
    """A line each, in order; what two stages differ in anyway is left out."""
    before = {
        "config": {"name": "a", "run_dir": "x", "optimizer": {"lr": 0.1, "eps": 1e-8}, "gone": 1},
        "data": {"seed": 3, "draws": {"a": 1}, "indexes": {"a": "0"}},
    }
    after = {
        "config": {"name": "b", "run_dir": "y", "optimizer": {"lr": 0.2, "eps": 1e-8}, "new": [2]},
        "data": {"seed": 4, "draws": {"b": 1}, "indexes": {}},
    }
    assert config_changes(before, after) == [
        "data_set.seed: 3 → 4",
        "gone: 1 → not there",
        "new: not there → [2]",
        "optimizer.lr: 0.1 → 0.2",
    ]
    assert config_changes(before, before) == []
