"""Pictures to judge, and others to compare them with."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.shapes import draw, scenes


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Five pictures of shapes, one of another size, and four as a reference."""
    for name, count, seed in (("ours", 5, 1), ("theirs", 4, 2)):
        (tmp_path / name).mkdir()
        for i, scene in enumerate(scenes(count, seed)):
            draw(scene, 48 if i == 2 else 64).save(tmp_path / name / f"{i}.png")
    return tmp_path / "ours", tmp_path / "theirs"
