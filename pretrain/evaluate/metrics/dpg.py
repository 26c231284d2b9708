"""dpg: questions about each prompt's picture, answered by a judge: DPG-Bench, GenEval 2, or a file of one's own."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pretrain.evaluate.judge import Answer, Interview, interview_of
from pretrain.evaluate.metric import Picture, Record, Result, Value
from pretrain.evaluate.pictures import prompts_of
from pretrain.evaluate.questions import INSTRUCTION, count_right, questions_of
from pretrain.evaluate.records import fingerprint

if TYPE_CHECKING:
    import torch


def arguments(parser: argparse.ArgumentParser) -> None:
    """It has no options but its judge's."""


def check_prompts(args: argparse.Namespace) -> None:
    """Raises ValueError for prompts without questions."""
    if args.prompts is None:
        raise ValueError("--prompts: dpg needs a file of prompts with their questions (docs/evaluation.md)")
    for entry in prompts_of(args.prompts):
        questions_of(entry, entry["prompt"])


def build(args: argparse.Namespace, device: torch.device) -> DpgScorer:
    """The scorer. Raises NotRun without a judge."""
    return DpgScorer(interview_of(args, device), fingerprint(prompts_of(args.prompts)))


class DpgScorer:
    """Asks every question of a picture's prompt, and scores by question, by category and in all."""

    def __init__(self, interview: Interview, questions: str):
        """Args: questions: hash of all prompts' questions."""
        self._interview = interview
        self.identity: Mapping[str, Any] = {
            **interview.judge.identity,
            "question": INSTRUCTION,
            "questions": questions,
        }
        self.batch = max(1, interview.judge.concurrency)

    def score(self, pictures: Sequence[Picture]) -> list[Record]:
        """The judge's answers, by the question's id: they are read when they are summed up."""
        asked = [(p, q) for p in pictures for q in questions_of(p.about, p.prompt)]
        answers = iter(self._interview.ask([(p, q.instruction) for p, q in asked]))
        found: list[Record] = []
        for picture in pictures:
            said = {q.id: next(answers) for q in questions_of(picture.about, picture.prompt)}
            found.append({name: {"text": a.text, "refused": a.refused} for name, a in said.items()})
        return found

    def summarise(self, pictures: Sequence[Picture], records: Sequence[Record]) -> Result:
        """The scores.

        A picture's is the share of its questions that are right, by the rule of dependencies; in all it is the mean over prompts.
        A category's is the mean over its questions without that rule, as DPG-Bench has it. A question without a readable answer
        is left out of both, and counted.
        """
        scores: dict[str, list[float]] = defaultdict(list)
        complete: list[float] = []
        categories: dict[str, list[float]] = defaultdict(list)
        by_question: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        notes = {"refused": 0, "unparsable": 0}
        for picture, record in zip(pictures, records, strict=True):
            questions = questions_of(picture.about, picture.prompt)
            right = {}
            for q in questions:
                answer = Answer(**record[q.id])
                said = right[q.id] = None if answer.refused else q.is_right(answer.conclusion)
                if said is None:
                    notes[answer.kind] += 1
                    continue
                broad, dash, _ = q.category.partition(" - ")
                for name in (broad, q.category) if dash else (broad,):
                    categories[name].append(float(said))
            prompt = str(picture.prompt)
            counted = {name: float(held) for name, held in count_right(questions, right).items() if held is not None}
            for name, held in counted.items():
                by_question[prompt][name].append(held)
            if counted:
                scores[prompt].append(fmean(counted.values()))
                complete.append(float(len(counted) == len(questions) and all(counted.values())))
        in_all = Value.mean([fmean(found) for found in scores.values()])
        values = {"score": Value(in_all.value, sum(map(len, scores.values())), in_all.sem)}
        values["all questions right"] = Value.mean(complete)
        values |= {name: Value(fmean(found), len(found)) for name, found in sorted(categories.items())}
        shares = {p: {name: fmean(found) for name, found in qs.items()} for p, qs in by_question.items()}
        return Result(values, {**notes, "prompts": len(scores), "score by question": shares})
