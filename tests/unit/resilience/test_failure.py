"""The line and the exit code of an error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.resilience.failure import report_failure


def watchdog(size: int) -> Any:
    return SimpleNamespace(world=SimpleNamespace(size=size), explain=lambda error: (f"explained: {error}", 75))


@pytest.fixture(autouse=True)
def launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "FOCUSDIT_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def test_a_users_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_failure(ValueError("no config"), None) == 1
    assert capsys.readouterr().err == "train: no config\n"


def test_the_watchdogs_explanation_comes_with_its_exit_code(capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert report_failure(RuntimeError("gloo"), watchdog(1)) == 75
    assert capsys.readouterr().err == "train: process 3: explained: gloo\n"


def test_one_process_of_several_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    report_failure(RuntimeError("gloo"), watchdog(2))
    assert codes == [75]


def test_a_defect_has_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError) as raised:
        {}["width"]
    assert report_failure(raised.value, None) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told and "test_failure.py" in told and told.endswith("train: 'width'\n")


def test_on_request_every_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOCUSDIT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no config"):
        report_failure(ValueError("no config"), None)
