"""Reports: sums that hold, a table for people, histograms, and the estimate of the whole."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from encoding import encode, report
from PIL import Image

from data_prep.shapes import write_tars


def test_the_report_is_readable_and_has_pictures(tmp_path: Path, capsys) -> None:
    rng = random.Random(0)
    write_tars(tmp_path / "tars", 24, seed=rng.randrange(9), per_tar=8, small_share=0.5)
    root = tmp_path / "data"
    assert encode(root, "--input", str(tmp_path / "tars")) == 0
    said = capsys.readouterr().out
    assert "for all 3 tars, judged by this one" in said
    text = (root / "report.txt").read_text()
    assert text.startswith("read 24 = written 24 + dropped 0, from 3 tars\n")
    assert "bytes per sample; captions padded to 300 tokens in 16 bits would make it" in text
    whole = report(root)
    assert sum(whole["tokens"].values()) == sum(whole["sizes"].values()) == 24
    assert set(whole["sizes"]) == {"320", "512"}
    per = whole["bytes_per_sample"]
    assert per["stored"] == pytest.approx(whole["stored_bytes"] / 24, abs=0.1)
    latents = sum(n for column, n in whole["column_bytes"].items() if not column.startswith("text"))
    assert per["padded_fp16"] == pytest.approx(latents / 24 + 300 * 128 * 2, abs=0.1)
    for name in ("report_tokens.png", "report_sizes.png"):
        picture = Image.open(root / name)
        assert picture.width > 500
        assert len(np.unique(np.asarray(picture.convert("L")))) > 2  # something is drawn
    disk = sum(p.stat().st_size for p in root.rglob("*.mds"))
    assert whole["stored_bytes"] == disk
