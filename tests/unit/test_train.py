"""The command that trains: its exit codes and its one line for a mistake."""

from __future__ import annotations

import pytest

from pretrain.train import main


def test_a_config_that_is_not_there_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage9"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: no config 'stage9'; there are ")


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo_256", "--nonsense"])
    assert ended.value.code == 2
