"""Libraries' routine messages stay out of a command's output; errors are seen."""

from __future__ import annotations

import logging

import pytest

from pretrain.console import silence_libraries


@pytest.fixture(autouse=True)
def _restored():
    """The loggers as they were."""
    loggers = [logging.getLogger(name) for name in ("DeepSpeed", "streaming")]
    before = [(logger, logger.level, list(logger.filters)) for logger in loggers]
    yield
    for logger, level, filters in before:
        logger.setLevel(level)
        logger.filters[:] = filters


@pytest.mark.parametrize("name", ["DeepSpeed", "streaming", "streaming.base.dataset"])
def test_errors_alone_are_written(name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the loggers of a library's modules, and after DeepSpeed has set the level that it sets when it is imported."""
    silence_libraries()
    logging.getLogger("DeepSpeed").setLevel(logging.INFO)
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "propagate", True)
    logger = logging.getLogger(name)
    logger.warning("routine")
    logger.error("broken")
    assert {record.message for record in caplog.records} == {"broken"}
