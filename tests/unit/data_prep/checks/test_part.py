"""Check of a part: what is wrong with single samples; test_verify.py damages whole data sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data_prep import schema
from data_prep.checks.part import sample_problem

CARD = schema.Card(
    {"name": "tiny", "width": 16}, {"name": "tiny", "channels": 4, "downsample": 8}, 5, "mean_std", [64, 128]
)
DETAILS = {"resolutions": [64], "bucket": None}


def row(**changes: Any) -> dict[str, Any]:
    latent = schema.Latent(torch.zeros(4, 8, 8), torch.ones(4, 8, 8))
    record = schema.Record("a/0/x", "caption", torch.ones(5, 16).bfloat16(), {64: latent}, 100, 200)
    return schema.to_row(record, CARD) | changes


def test_a_whole_sample_has_no_problem() -> None:
    assert sample_problem(row(), "a/0", CARD, DETAILS) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key": "a/01/x"}, "its key does not start with a/0/"),
        ({"caption": " \n"}, "its caption is empty"),
        ({"text": np.zeros((6, 16), np.uint16)}, "expected (1 to 5, 16)"),
        ({"text": np.full((5, 16), 0x7F80, np.uint16)}, "text is not finite"),
        ({"width": 128, "height": 128}, "belongs to another set"),
        ({"height": 63}, "belongs to another set"),
        ({"latent_64_mean": np.zeros((4, 8, 9), np.float16)}, "expected (4, 8, 8)"),
        ({"latent_64_mean": np.full((4, 8, 8), np.nan, np.float16)}, "latent_64_mean is not finite"),
        ({"latent_64_std": np.full((4, 8, 8), -1, np.float16)}, "latent_64_std is below 0"),
    ],
)
def test_each_problem_is_named(changes: dict[str, Any], words: str) -> None:
    problem = sample_problem(row(**changes), "a/0", CARD, DETAILS)
    assert problem is not None and words in problem
