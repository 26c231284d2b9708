"""Reports: sums that hold, a table for people, histograms, and the estimate of the whole."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from encoding import encode, report
from PIL import Image

from data_prep import schema
from data_prep.inputs.captions import CaptionChoice
from data_prep.inputs.filters import Filter
from data_prep.inputs.sources import Job, Source
from data_prep.shapes import write_tars
from data_prep.worker.report import Tally, card_counts, estimate, size_text, summary, table


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


CARD = schema.Card({"width": 16}, {}, 10, "mean", [64])
JOB = Job(Source("a", (), CaptionChoice(), Filter()), "0", "0.tar", 500)


class Writer:
    """The counts of a part's writer."""

    def __init__(self, written: dict[str, int]):
        self.written, self.sets = written, {name: {} for name in written}
        self.bytes = {"text": 10, "latent": 30}

    def error(self, what: str) -> float | None:
        return {"text": 0.2}.get(what)


def tally() -> Tally:
    counts = Tally(JOB, read=5)
    counts.drop(3, "k3", "too_small", "")
    counts.drop(1, "k1", "no_image", "")
    for tokens, side in ((7, 130), (7, 120), (9, 200)):
        counts.write(tokens, side, 1000)
    return counts


def test_a_tars_report() -> None:
    part = tally().report(Writer({"64": 3}), 50)  # type: ignore[arg-type]
    assert (part["tar"], part["tar_bytes"], part["read"], part["written"]) == ("0.tar", 500, 5, {"64": 3})
    assert part["dropped"] == {"no_image": 1, "too_small": 1} and part["text_error"] == 0.2
    assert part["tokens"] == {"7": 2, "9": 1} and part["sizes"] == {"64": 1, "128": 1, "192": 1}
    assert [reject["key"] for reject in tally().rejects()] == ["k1", "k3"]  # in the tar's order
    with pytest.raises(AssertionError):
        tally().report(Writer({"64": 2}), 50)  # type: ignore[arg-type]


def test_the_sums_over_parts() -> None:
    part = tally().report(Writer({"64": 3}), 50)  # type: ignore[arg-type]
    sums = summary([("a/0", part), ("a/1", part), ("b/0", part)], CARD)
    assert (sums["tars"], sums["read"], sums["written"], sums["stored_bytes"]) == (3, 15, 9, 150)
    assert sums["sources"]["a"]["tokens"] == {"7": 4, "9": 2}
    assert sums["bytes_per_sample"] == {"stored": 16.7, "padded_fp16": 10 + 10 * 16 * 2}
    counts = card_counts(sums)
    assert counts["parts"] == 3 and counts["written"] == 9 and counts["dropped"] == {"no_image": 3, "too_small": 3}
    assert table(sums, CARD).startswith("read 15 = written 9 + dropped 6, from 3 tars\n")
    assert estimate([part, part], 5000) == 500


@pytest.mark.parametrize(("size", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2.5e12, "2.50 TB")])
def test_sizes_for_people(size: float, words: str) -> None:
    assert size_text(size) == words
