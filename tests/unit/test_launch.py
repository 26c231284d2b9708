"""The launcher's decisions with small programs in the trainings' place; tests/distributed/test_launchers.py has real ones."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from pretrain import launch
from pretrain.launch import Launcher, main


def program(source: str) -> list[str]:
    return [sys.executable, "-S", "-c", f"import os, signal, sys, time\n{source}"]


def wait_for_files(folder: Path, count: int) -> None:
    while len(list(folder.iterdir())) < count:
        time.sleep(0.01)


def test_each_process_has_its_place(tmp_path: Path) -> None:
    names = "FOCUSDIT_LAUNCHER_PID", *launch.TORCH
    write = f"open('{tmp_path}/' + os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert Launcher(program(write), 2, nodes=3, node_rank=2, address="head:77").run(0) == 0
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "4": f"{os.getpid()} 4 0 6 2 head 77",
        "5": f"{os.getpid()} 5 1 6 2 head 77",
    }


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("pass", 0),
        ("sys.exit(75)", 75),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("os.environ['RANK'] == '0' or sys.exit(1); time.sleep(60)", 1),  # the others are not waited for without end
    ],
)
def test_it_ends_as_its_processes_do(source: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 1.0)
    assert Launcher(program(source), 2).run(0) == code


def test_lost_processes_are_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """After 75 and after a kill, as often as was asked for; an error is not repeated."""
    count = f"path = '{tmp_path}/starts'; open(path, 'a').write('x'); starts = len(open(path).read())\n"
    for ends, restarts, code in (
        (("75", "0"), 3, 0),
        (("75", "75", "75"), 1, 75),
        (("1", "0"), 3, 1),
    ):
        (tmp_path / "starts").unlink(missing_ok=True)
        source = count + f"sys.exit([{', '.join(ends)}][starts - 1])"
        assert Launcher(program(source), 1).run(restarts) == code
        assert len((tmp_path / "starts").read_text()) == {0: 2, 75: 2, 1: 1}[code]
    assert "launch: ended with code 75; starting again (3 of 3 restarts left)\n" in capfd.readouterr().out


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_all_and_nothing_starts_again(number: signal.Signals, tmp_path: Path) -> None:
    handler = f"signal.signal({int(number)}, lambda *_: (time.sleep(0.5), sys.exit(75)))"
    source = f"{handler}; open('{tmp_path}/' + os.environ['RANK'], 'w').close(); time.sleep(60)"

    sender = threading.Thread(target=lambda: (wait_for_files(tmp_path, 2), os.kill(os.getpid(), number)))
    sender.start()
    before = signal.getsignal(number)
    assert Launcher(program(source), 2).run(restarts=5) == 75
    assert signal.getsignal(number) == before
    sender.join()


def test_a_signal_while_they_import_is_no_loss(tmp_path: Path) -> None:
    """It kills processes that do not listen yet, or that are not all there: a start goes on from where it was."""
    started = Launcher(program(f"open('{tmp_path}/' + os.environ['RANK'], 'w').close(); time.sleep(60)"), 2)
    timer = threading.Thread(target=lambda: (wait_for_files(tmp_path, 2), os.kill(os.getpid(), signal.SIGTERM)))
    timer.start()
    assert started.run(restarts=5) == 75
    timer.join()
    early = Launcher(program("time.sleep(60)"), 2, asked=signal.SIGUSR1)
    assert early.run(restarts=5) == 75


def test_nohup_lets_it_go_on(tmp_path: Path) -> None:
    """The terminal's end is no request then."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        source = "os.kill(os.getppid(), signal.SIGHUP); os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.5)"
        assert Launcher(program(source), 1).run(0) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_wrong_usage_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, said in (
        (["--processes", "0", "demo_256"], "--processes must be 1 or more"),
        (["demo_256", "--processes", "2", "--restarts=3"], "--processes, --restarts=3: must stand before CONFIG"),
        (["--processes", "1"], "CONFIG is missing: "),
        (["--processes", "2", "-m", "pretrain.train", "demo_256"], "unrecognized: -m; after its own options comes CONFIG, wi"),
        (["--nproc-per-node=2", "demo_256"], "unrecognized: --nproc-per-node=2; after its own options comes CONFIG"),
        (["--processes", "2", "pretrain.train", "demo_256"], "pretrain.train is what it starts; give CONFIG alone"),
        (["demo_256", "--help"], "--help: must stand before CONFIG"),
        (["--processes", "1", "--"], "CONFIG is missing: "),
        (["--processes", "1", "--nodes", "2", "--node-rank", "2", "demo_256"], "--node-rank must be from 0 to 1; --address is"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
