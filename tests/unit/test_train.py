"""The command that trains: its exit codes and its one line for a mistake."""

from __future__ import annotations

import os

import pytest

from pretrain import training
from pretrain.train import main


def test_a_config_that_is_not_there_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage9"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: no config 'stage9'; there are ")


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo_256", "--nonsense"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr", "1e-4"], "unrecognized: --lr 1e-4; a field is set without dashes: optimizer.lr=1e-4"),
        (["--optimizer.lr=1e-4"], "unrecognized: --optimizer.lr=1e-4; a field is set without dashes"),
        (["--check", "--processes", "0"], "argument --processes: must be 1 or more, not 0"),
        (["--check", "--processes=-2"], "argument --processes: must be 1 or more, not -2"),
    ],
)
def test_habits_of_other_programs_are_told_the_way(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo_256", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("users", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_gpu_memory_is_taken_in_segments_that_grow_unless_the_user_says_otherwise(
    users: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")  # undone afterwards, whoever sets it
        monkeypatch.delenv(name)
    if users:
        monkeypatch.setenv(users, "backend:native")
    seen: dict[str, str] = {}
    monkeypatch.setattr(training, "run", lambda *_: seen.update(os.environ) or 0)
    assert main(["demo_256"]) == 0
    expected = {users: "backend:native"} if users else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert {name: seen[name] for name in names if name in seen} == expected
