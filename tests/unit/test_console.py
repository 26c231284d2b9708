"""Libraries' routine messages stay out of a command's output; errors are seen."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pretrain.console import silence_libraries

CPP_EXTENSION = "torch.utils.cpp_extension"


@pytest.fixture(autouse=True)
def _restored():
    """The loggers as they were."""
    loggers = [logging.getLogger(name) for name in ("DeepSpeed", "streaming", "matplotlib", CPP_EXTENSION)]
    before = [(logger, logger.level, list(logger.filters)) for logger in loggers]
    yield
    for logger, level, filters in before:
        logger.setLevel(level)
        logger.filters[:] = filters


@pytest.mark.parametrize("name", ["DeepSpeed", "streaming", "streaming.base.dataset", "matplotlib"])
def test_errors_alone_are_written(name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the loggers of a library's modules, and after DeepSpeed has set the level that it sets when it is imported."""
    silence_libraries()
    logging.getLogger("DeepSpeed").setLevel(logging.INFO)
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "propagate", True)
    logger = logging.getLogger(name)
    logger.warning("routine")
    logger.error("broken")
    assert {record.message for record in caplog.records} == {"broken"}


def test_a_cpu_beside_a_cuda_toolkit_is_no_news(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What torch writes when it looks for the toolkit; its other warnings stay."""
    silence_libraries()
    logger = logging.getLogger(CPP_EXTENSION)
    monkeypatch.setattr(logger, "propagate", True)
    (tmp_path / "cuda").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    from torch.utils import cpp_extension

    cpp_extension._find_cuda_home()
    logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]
