"""The schema: columns, stored values, the card and its fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoding import encode, report, rows

from data_prep import schema


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_text_in_8_bits(shape_tars: Path, tmp_path: Path, dtype: str) -> None:
    roots = {"bfloat16": tmp_path / "16", dtype: tmp_path / "8"}
    for kind, root in roots.items():
        assert encode(root, "--input", str(shape_tars / "00000.tar"), "--text-dtype", kind) == 0
    exact, small = rows(roots["bfloat16"]), rows(roots[dtype])
    lost = there = 0.0
    for key, row in exact.items():
        text, other = schema.text_of(row, "bfloat16").float(), schema.text_of(small[key], dtype).float()
        assert schema.text_of(small[key], dtype).dtype == torch.bfloat16
        assert text.shape == other.shape
        # Half a step of the token's own scale, and bf16's rounding of the result.
        step = text.abs().amax(1, keepdim=True) / 127 if dtype == "int8" else text.abs() / 8 + 1e-3
        assert ((other - text).abs() <= 0.5 * step + text.abs() * 2**-8).all()
        lost, there = lost + float((other - text).square().sum()), there + float(text.square().sum())
    assert report(roots[dtype])["text_error"] == pytest.approx((lost / there) ** 0.5, abs=2e-6)
    assert report(roots["bfloat16"])["text_error"] is None
    columns = {kind: report(root)["column_bytes"] for kind, root in roots.items()}
    assert columns[dtype]["text"] * 2 == columns["bfloat16"]["text"]
    assert schema.Card.load(roots[dtype]).fingerprint != schema.Card.load(roots["bfloat16"]).fingerprint
