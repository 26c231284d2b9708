"""What each fault leads to, with real processes: docs/operations.md names these tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from faults import at_step, bad_losses
from support import SMALL, ended, fork_training, same_state, scalars, start_training, wait_for_line

from pretrain.checkpoint.reader import newest
from pretrain.resilience.signals import REQUEUE

# So that a lost process is noticed soon; a step takes less than a hundredth of it, also beside other work.
SOON = "guard.seconds=15"
EVERY_TWO = ("checkpoint.every=2", "checkpoint.keep_every=0", SOON)
QUICK = (*SMALL, *EVERY_TWO, "steps=8")
NAN, SPIKE = float("nan"), 1e4


@pytest.fixture(scope="module")
def straight(data_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, eight steps, nothing amiss."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    log = run_dir.parent / "log"
    for process in fork_training(log, "demo_256", *QUICK, f"data.path={data_set}", f"run_dir={run_dir}", processes=2):
        process.join(300)
        assert process.exitcode == 0, log.read_text()
    return run_dir


@pytest.fixture
def words(data_set: Path, tmp_path: Path) -> list[str]:
    return [*QUICK, f"data.path={data_set}", f"run_dir={tmp_path / 'run'}"]


# ---- asked to stop ----


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_after_a_checkpoint(number, words, straight, train, tmp_path: Path) -> None:
    log = tmp_path / "log"
    started = fork_training(log, "demo_256", *words, processes=2)
    wait_for_line(log, "step 3/8")
    os.kill(started[1].pid, number)
    assert ended(started) == [REQUEUE, REQUEUE], log.read_text()
    step = newest(tmp_path / "run").run_state.step  # type: ignore[union-attr]
    assert 3 <= step < 8
    assert f"stopped by {number.name} (process 1) after step {step}; started again, it goes on" in log.read_text()
    finished = train("demo_256", *words, processes=2)
    assert f"step {step}, epoch" in finished.output
    assert same_state(tmp_path / "run", straight)
    assert scalars(tmp_path / "run", "train/loss") == scalars(straight, "train/loss")


def test_a_second_signal_stops_at_once(words, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = [*words, "guard.seconds=600"]
    (process,) = fork_training(log, "demo_256", *words, before=partial(at_step, 3, 0, "sleep"))
    wait_for_line(log, "asleep")
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(3)  # sooner, a second one counts as the first sent twice; longer does no harm
    assert process.is_alive()  # it would write a checkpoint at the end of the step, which does not come
    os.kill(process.pid, signal.SIGTERM)
    assert ended([process]) == [128 + signal.SIGTERM]
    assert "a second signal (SIGTERM): stopping at once" in log.read_text()


def test_the_limit_of_time_stops_after_a_checkpoint(words, straight, train, tmp_path: Path) -> None:
    stopped = train("demo_256", *words, "checkpoint.time_limit=1e-9", "checkpoint.every=100", processes=2, check=False)
    assert stopped.codes == [REQUEUE, REQUEUE]
    assert "stopped by the time limit (checkpoint.time_limit) (process 0, 1) after step 1" in stopped.output
    train("demo_256", *words, processes=2)
    assert same_state(tmp_path / "run", straight)


# ---- checkpoints ----


def truncate(folder: Path) -> str:
    path = max(folder.glob("rank_*"))
    os.truncate(path, path.stat().st_size - 100)
    return f"{path} is damaged: {path.stat().st_size} bytes, expected"


def flip_a_bit(folder: Path) -> str:
    path = min(folder.glob("rank_*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path} is damaged: its hash is not the recorded one"


def flip_a_bit_of_the_state(folder: Path) -> str:
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"updates": 8', '"updates": 9'))
    return f"{path} is damaged: it does not match its own hash"


def lose_a_file(folder: Path) -> str:
    path = max(folder.glob("rank_*"))
    path.unlink()
    return f"{path} is missing"


def lose_the_state(folder: Path) -> str:
    (folder / "state.json").unlink()
    return f"{folder / 'state.json'} cannot be read"


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, flip_a_bit_of_the_state, lose_a_file, lose_the_state])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damage, words, straight, train, tmp_path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    line = damage(folder / "step_00000008")
    finished = train("demo_256", *words, processes=2)
    assert f"WARNING: {line}" in finished.output
    assert "taking the one before" in finished.output
    assert "step_00000006: step 6" in finished.output
    assert same_state(tmp_path / "run", straight)
    assert (folder / "aside_00000008").is_dir()  # for whoever wants to look at it


def test_without_a_whole_checkpoint_nothing_starts_anew(words, straight, train, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").glob("step_*"):
        flip_a_bit(folder)
    finished = train("demo_256", *words, processes=2, check=False)
    assert finished.codes == [1, 1]
    assert "no checkpoint can be used" in finished.output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 190 MB, for checkpoints of 40 MB."""
    folder = tmp_path / "run"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=190m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk_leaves_the_old_checkpoints_and_training_goes_on(
    background, words, straight, small_disk: Path, train
) -> None:
    words = [*words, "checkpoint.keep_last=3", f"checkpoint.background={background}"]
    fill = partial(at_step, 3, 0, str(small_disk))
    finished = train("demo_256", *words, processes=2, before=fill, check=False)
    assert "WARNING: " in finished.output
    assert "step_00000004 could not be written: process" in finished.output
    assert "No space left on device" in finished.output
    assert "training goes on, the checkpoints before are whole" in finished.output
    assert "step 8/8" in finished.output
    assert finished.codes == [1, 1]  # the last one could not be written either
    folder = small_disk / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000002"]
    newest(small_disk).verify()  # type: ignore[union-attr]
    subprocess.run(["mount", "-o", "remount,size=500m", small_disk], check=True)
    train("demo_256", *words, processes=2)
    assert same_state(small_disk, straight)


def test_a_checkpoint_holds_no_pickle(straight: Path) -> None:
    kinds = {p.suffix for p in (straight / "checkpoints").rglob("*") if p.is_file()}
    assert kinds == {".safetensors", ".json", ""}


# ---- steps that would harm ----


def test_a_nan_on_one_process_skips_the_step_on_all_and_records_its_samples(words, train, tmp_path: Path) -> None:
    finished = train("demo_256", *words, processes=2, before=partial(bad_losses, {4: NAN}, 1))
    assert "WARNING: step 4 was skipped: the loss is nan (1 in a row, 1 in all" in finished.output
    (line,) = (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()
    skipped = json.loads(line)
    assert (skipped["step"], skipped["loss"]) == (4, "nan")
    assert [s["loss"] == "nan" for s in skipped["samples"]] == [False, False, True, True]
    assert len({s["key"] for s in skipped["samples"]}) == 4
    found = newest(tmp_path / "run")
    assert found is not None
    assert (found.run_state.step, found.run_state.updates, found.run_state.history.skipped) == (8, 7, 1)
    assert all(value.isfinite().all() for value in found.parameters("master").values())
    assert scalars(tmp_path / "run", "train/steps_skipped")[4] == 1


def test_a_spike_is_skipped(words, train, tmp_path: Path) -> None:
    words = [*words, "guard.window=6", "guard.min_history=4"]
    finished = train("demo_256", *words, processes=2, before=partial(bad_losses, {7: SPIKE}, 0))
    assert "step 7 was skipped: the loss is" in finished.output
    assert "the bound after the last 6 steps" in finished.output
    assert newest(tmp_path / "run").run_state.updates == 7  # type: ignore[union-attr]


def test_a_resumed_run_skips_what_an_uninterrupted_one_skips(words, train, tmp_path: Path) -> None:
    words = [w for w in words if not w.startswith("run_dir")] + ["guard.window=6", "guard.min_history=4"]
    spike, straight, halves = partial(bad_losses, {7: SPIKE}, 0), tmp_path / "straight", tmp_path / "halves"
    train("demo_256", *words, f"run_dir={straight}", processes=2, before=spike)
    log = tmp_path / "log"
    started = fork_training(log, "demo_256", *words, f"run_dir={halves}", processes=2, before=spike)
    wait_for_line(log, "step 5/8")
    for process in started:
        process.kill()
        process.join()
    train("demo_256", *words, f"run_dir={halves}", processes=2, before=spike)
    assert same_state(halves, straight)


def test_several_skipped_steps_in_a_row_lead_back_with_another_data_order(words, train, tmp_path: Path) -> None:
    words = [*words, "guard.patience=2", "guard.rollbacks=1", "checkpoint.every=3"]
    finished = train("demo_256", *words, processes=2, before=partial(bad_losses, {4: NAN, 5: NAN}), check=False)
    back = f"back to {tmp_path / 'run' / 'checkpoints' / 'step_00000003'} with other noise and data order (1 of 1 rollbacks)"
    assert back in finished.output
    # The fault of this test comes back at the same steps: it stops with a report.
    assert finished.codes == [1, 1]
    assert "steps up to 5 were skipped, the last one because the loss is nan, after 1 rollbacks" in finished.output
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 5, 4, 5]
    keys = [{s["key"] for s in line["samples"]} for line in lines]
    assert keys[:2] != keys[2:]


def test_after_a_rollback_the_run_finishes_and_its_curve_has_no_doubled_point(words, train, tmp_path: Path) -> None:
    words = [*words, "guard.patience=2", "checkpoint.every=3"]
    once = partial(bad_losses, {4: NAN, 5: NAN}, 0, 2)
    finished = train("demo_256", *words, processes=2, before=once)
    assert "(1 of 3 rollbacks)" in finished.output
    found = newest(tmp_path / "run")
    assert found is not None
    assert (found.run_state.step, found.run_state.updates) == (8, 8)
    assert (found.run_state.history.rollbacks, found.run_state.history.skipped) == (1, 2)
    assert list(scalars(tmp_path / "run", "train/loss")) == list(range(1, 9))


# ---- damaged data ----


@pytest.fixture
def flipped(data_set: Path, tmp_path: Path) -> Path:
    """The data set with one flipped byte in one sample; returns the shard, whose set has others."""
    copy = tmp_path / "set"
    shutil.copytree(data_set, copy)
    shard = max(copy.rglob("*.mds"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    return shard


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_byte_in_a_shard_is_named_and_its_sample_replaced(workers, words, flipped, train, tmp_path) -> None:
    words = [*words, f"data.path={tmp_path / 'set'}", f"data.workers={workers}", "data.timeout=60"]
    finished = train("demo_256", *words, processes=2)
    name = flipped.relative_to(tmp_path / "set")
    assert finished.output.count(f"WARNING: {name}: sample ") == 1  # although it is met in both epochs
    assert "others stand in (1 of 10 damaged shards)" in finished.output
    found = newest(tmp_path / "run")
    assert found is not None
    assert (found.run_state.step, found.run_state.images) == (8, 32)


def test_more_damaged_shards_than_allowed_stop_the_run(words, flipped, train, tmp_path: Path) -> None:
    words = [*words, f"data.path={tmp_path / 'set'}", "data.damaged_shards=0"]
    finished = train("demo_256", *words, processes=2, check=False)
    assert finished.codes == [1, 1]
    name = flipped.relative_to(tmp_path / "set")
    assert f"1 damaged shard in {tmp_path / 'set'}, data.damaged_shards allows 0: {name}" in finished.output


def test_a_missing_shard_is_named_and_its_samples_replaced(words, flipped, train, tmp_path: Path) -> None:
    flipped.unlink()
    finished = train("demo_256", *words, f"data.path={tmp_path / 'set'}", processes=2)
    name = flipped.relative_to(tmp_path / "set")
    assert f"{tmp_path / 'set' / name}: missing" in finished.output
    assert "others stand in (1 of 10 damaged shards)" in finished.output
    assert newest(tmp_path / "run").run_state.images == 32  # type: ignore[union-attr]


# ---- processes that are lost ----


def lose(words, folder: Path, faults: Sequence[tuple[int, str]]) -> list[list[ForkServerProcess]]:
    """Two runs at a time, of which one loses process 0 and one process 1, at a step, by a signal or an error.

    They write to log_0 and log_1.
    """
    runs = []
    for victim, (step, number) in enumerate(faults):
        fault = partial(at_step, step, victim, number)
        given = [*words, f"run_dir={folder / f'run_{victim}'}"]
        runs.append(fork_training(folder / f"log_{victim}", "demo_256", *given, processes=2, before=fault))
    return runs


def test_a_process_that_dies_ends_all_and_is_named(words, tmp_path: Path) -> None:
    for victim, started in enumerate(lose(words, tmp_path, [(3, "SIGKILL"), (3, "SIGKILL")])):
        codes, log = ended(started), (tmp_path / f"log_{victim}").read_text()
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == REQUEUE, log
        assert f"process {victim} on " in log and " died" in log
        assert "3 steps done" in log


def test_a_process_that_is_stopped_ends_all_and_is_named(words, tmp_path: Path) -> None:
    # The second one right after the first step: its last sign of life still comes from the start, which may take longer.
    steps = (3, 1)
    for victim, started in enumerate(lose(words, tmp_path, [(step, "SIGSTOP") for step in steps])):
        started[1 - victim].join(200)
        log = (tmp_path / f"log_{victim}").read_text()
        assert started[1 - victim].exitcode == REQUEUE, log
        assert started[victim].is_alive()  # SIGSTOP: the launcher's SIGKILL ends it
        started[victim].kill()
        assert re.search(rf"watchdog: process {victim} on .* gave no sign of life for \d+ s", log)
        assert f"{steps[victim]} steps done" in log


def test_a_process_that_hangs_ends_all_and_is_named(words, tmp_path: Path) -> None:
    log = tmp_path / "log"
    started = fork_training(log, "demo_256", *words, processes=2, before=partial(at_step, 3, 1, "sleep"))
    assert ended(started) == [REQUEUE, REQUEUE], log.read_text()
    assert "watchdog: no step for 15 s; process 1 on " in log.read_text()
    assert "reading data for" in log.read_text()
    where = log.read_text().partition("watchdog: where process 1 is:")[2]
    assert 'faults.py", line' in where and "in faulty" in where


def test_an_error_of_one_process_ends_all_and_is_told_by_all(words, tmp_path: Path) -> None:
    for culprit, started in enumerate(lose(words, tmp_path, [(3, "error"), (3, "error")])):
        codes, log = ended(started), (tmp_path / f"log_{culprit}").read_text()
        assert codes == [1, 1], log
        assert f"process {culprit} failed: a fault of its own" in log


def test_the_command_itself_stops_and_goes_on(words, straight, train, tmp_path: Path) -> None:
    """As users start it, without the tests' preloaded process."""
    started = start_training("demo_256", *words, processes=2)
    for line in started[0].stdout:  # type: ignore[union-attr]
        if line.startswith("step 2/"):
            break
    started[0].send_signal(signal.SIGUSR1)
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [REQUEUE, REQUEUE], outputs
    train("demo_256", *words, processes=2)
    assert same_state(tmp_path / "run", straight)
