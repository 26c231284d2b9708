"""sctf: Structural Clarity and Textural Fidelity (the paper's §5.1): a judge gives each picture 0 to 10."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pretrain.evaluate.judge import Answer, Interview, interview_of
from pretrain.evaluate.metric import Picture, Record, Result, Value

if TYPE_CHECKING:
    import torch

PAPERS_COUNT = 5120
# The paper does not print its prompt: this one is ours, and stands in the result.
QUESTION = """Judge the quality of this generated picture, whatever it shows.
Structure: are objects, faces, limbs, buildings and text clear and well formed, without distortion or missing and extra parts?
Texture: are surfaces and fine details such as hair, fabric and leaves faithful and sharp, without blur, noise, artifacts or \
hallucinated patterns?
Give each a number from 0 (worst) to 10 (flawless), and one score from 0 to 10 for the whole picture. Answer in this form alone:
Structure: <number>
Texture: <number>
Score: <number>"""
PARTS = ("structure", "texture")

_NUMBER = r"(\d+(?:\.\d+)?)(?!\.?\d)"
_OF_TEN = rf"{_NUMBER}\s*(?:/|out of)\s*10\b"


def arguments(parser: argparse.ArgumentParser) -> None:
    """It has no options but its judge's."""


def check_prompts(args: argparse.Namespace) -> None:
    """It takes any prompts."""


def build(args: argparse.Namespace, device: torch.device) -> SctfScorer:
    """The scorer. Raises NotRun without a judge."""
    return SctfScorer(interview_of(args, device))


class SctfScorer:
    """Asks for a picture's score s_i; SCTF is their mean (Eq. 6), ± their standard deviation / √N (Eq. 7)."""

    def __init__(self, interview: Interview):
        self._interview = interview
        self.identity: Mapping[str, Any] = {**interview.judge.identity, "question": QUESTION}
        self.batch = 8 * interview.judge.concurrency

    def score(self, pictures: Sequence[Picture]) -> list[Record]:
        """The judge's answers: they are read when they are summed up."""
        return [
            {"text": answer.text, "refused": answer.refused}
            for answer in self._interview.ask([(picture, QUESTION) for picture in pictures])
        ]

    def summarise(self, pictures: Sequence[Picture], records: Sequence[Record]) -> Result:
        """The means over the pictures that have a score; the others are counted by kind."""
        answers = [Answer(**record) for record in records]
        scores = [score_of(answer, "score") for answer in answers]
        kinds = [answer.kind for answer, score in zip(answers, scores, strict=True) if score is None]
        values = {"score": Value.mean([s for s in scores if s is not None])}
        for part in PARTS:
            values[part] = Value.mean([s for a in answers if (s := score_of(a, part)) is not None])
        notes = {"refused": kinds.count("refused"), "unparsable": kinds.count("unparsable")}
        return Result(values, {**notes, "pictures in the paper": PAPERS_COUNT})


def score_of(answer: Answer, name: str) -> float | None:
    """The number from 0 to 10 that an answer gives by name, such as "Score: 7.5" or "**Score**: 8/10".

    Without a name a bare number, or the only "N/10" of a sentence, is the score. None where there is none, or more than one.
    """
    if answer.refused:
        return None
    text = re.sub(r"[*_`#]|\(?\b0\s*(?:-|–|to)\s*10\b\)?", "", answer.conclusion)
    found = set(re.findall(rf"\b{name}\b(?:\s+(?:is|of))?\s*[:=]?\s*{_NUMBER}", text, re.IGNORECASE))
    if not found and name == "score":
        bare = re.fullmatch(rf"{_NUMBER}(?:\s*/\s*10)?\.?", text.strip())
        labelled = re.search(rf"\b(?:{'|'.join(PARTS)})\b\s*[:=]", text, re.IGNORECASE)
        found = {bare[1]} if bare else set() if labelled else set(re.findall(_OF_TEN, text))
    numbers = {float(number) for number in found}
    return numbers.pop() if len(numbers) == 1 and max(numbers) <= 10 else None
