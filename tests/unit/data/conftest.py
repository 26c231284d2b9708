"""A small data set that tests of single files share, and a copy to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from data_sets import write_set


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 samples of one set, in three shards."""
    return write_set(tmp_path_factory.mktemp("whole") / "set", {"a": 40})


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "set")
