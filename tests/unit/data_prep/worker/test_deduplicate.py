"""Deduplication: of several copies across tars the first one that is written stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from encoding import encode, jpeg, report, rows, write_pictures
from support import contents


@pytest.mark.parametrize("method", ["exact", "perceptual"])
def test_duplicates_across_tars_are_stored_once(tmp_path: Path, method: str) -> None:
    """The first copy that would be written stays, whichever tar is read first; other samples take no part."""
    tars = tmp_path / "tars"
    about = {"caption": "a picture", "score": 1}
    write_pictures(
        tars / "0.tar",
        {
            "filtered": (jpeg(96, 96, 1), {**about, "score": 0}),  # the later copy of it must stay
            "small": (jpeg(48, 48, 2), about),
            "first": (jpeg(96, 96, 3), about),
        },
    )
    write_pictures(
        tars / "1.tar",
        {
            "again": (jpeg(96, 96, 3), about),
            "smaller": (jpeg(80, 80, 3, quality=60), about),
            "one": (jpeg(96, 96, 1), about),
            "two": (jpeg(96, 96, 2), about),
        },
    )
    expected = {"0/first", "1/one", "1/two"} | ({"1/smaller"} if method == "exact" else set())
    options = ("--filter", "score > 0", "--duplicates", method)
    outputs = []
    for order in ("0", "1"):
        root = tmp_path / f"data{order}"
        if order == "1":  # as if another worker had read the second tar first
            assert encode(root, "--input", str(tars), *options) == 0
            (root / "reports" / "images" / "0.json").unlink()
        assert encode(root, "--input", str(tars), *options) == 0
        assert set(rows(root)) == {f"images/{name}" for name in expected}
        outputs.append(contents(root))
    assert outputs[0] == outputs[1]
    rejects = [json.loads(s) for s in (root / "reports" / "images" / "1.jsonl").read_text().splitlines()]
    assert {(r["key"], r["reason"], r["detail"]) for r in rejects} >= {("again", "duplicate", "of images/0/first")}
    assert report(root)["read"] == 7
