"""SCTF: the score in a judge's words, and the paper's Eq. 6 and 7 over the pictures that have one."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from pretrain.evaluate.__main__ import main
from pretrain.evaluate.judge import Answer
from pretrain.evaluate.metrics.sctf import QUESTION, score_of

from .conftest import Asked, Endpoint, completion, number_of


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Structure: 8\nTexture: 7\nScore: 7.5", 7.5),
        ("**Structure:** 8/10\n**Texture:** 9/10\n**Score:** 8/10\n", 8.0),
        ("structure = 3\nscore = 4", 4.0),
        ("Score (0-10): 6", 6.0),
        ("<think>Score: 2? No.</think>\nScore: 9", 9.0),
        ("10", 10.0),
        ("0", 0.0),
        ("7.25/10.", 7.25),
        ("A sharp picture; I would give it 8 out of 10.", 8.0),
        ("The overall score is 6.", 6.0),
        ("Score: 8. To repeat, the score is 8", 8.0),
        ("Score: 11", None),
        ("Score: -3", None),
        ("Score: eight", None),
        ("Score: 8 ... on reflection, score: 5", None),
        ("Structure: 8/10\nTexture: 8/10", None),
        ("8/10 for the sky and 3/10 for the hands", None),
        ("There are 2 dogs in the picture.", None),
        ("I'm sorry, I can't rate this.", None),
        ("", None),
    ],
)
def test_the_score_is_read(text: str, score: float | None) -> None:
    assert score_of(Answer(text), "score") == score


def test_parts_are_read_by_name_alone() -> None:
    answer = Answer("Structure: 8\nTexture: 7.5\nScore: 6")
    assert [score_of(answer, part) for part in ("structure", "texture")] == [8.0, 7.5]
    assert score_of(Answer("9"), "structure") is None and score_of(Answer("9", refused=True), "score") is None


def test_the_papers_mean_and_error(endpoint: Endpoint, pictures: Path, tmp_path: Path) -> None:
    """Of six pictures one is refused, one answered in prose without a number."""
    replies = {
        0: "Structure: 9\nTexture: 8\nScore: 8",
        1: "Score: 6",
        2: "5.5",
        3: "I'd say 9/10!",
        4: completion(None, refusal="no"),
        5: "What a lovely red.",
    }

    def reply(asked: Asked) -> object:
        assert asked.question == QUESTION
        return replies[number_of(asked, pictures)]

    endpoint.reply = reply
    command = ["--pictures", str(pictures), "--out", str(tmp_path / "out"), "--metrics", "sctf", *endpoint.options()]
    assert main(command) == 0
    found = json.loads((tmp_path / "out/sctf.json").read_text())
    scores = [8.0, 6.0, 5.5, 9.0]
    assert found["values"]["score"]["value"] == pytest.approx(sum(scores) / 4)
    assert found["values"]["score"]["sem"] == pytest.approx(statistics.stdev(scores) / 4**0.5)
    assert [found["values"][name]["count"] for name in ("score", "structure", "texture")] == [4, 1, 1]
    assert found["notes"] == {"refused": 1, "unparsable": 1, "pictures in the paper": 5120}
    assert (found["scorer"]["judge"], found["scorer"]["question"]) == ("a-judge", QUESTION)
