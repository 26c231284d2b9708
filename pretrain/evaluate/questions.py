"""Questions about a prompt's picture, each with the answer that is right, from the user's file.

    {"prompt": "two red cubes", "questions": [{"id": 1, "question": "Are there cubes?", "category": "entity"},
        {"id": 2, "question": "How many cubes are there?", "category": "count", "answer": "two", "depends_on": [1]}]}

The published files are read as they are: DPG-Bench's CSV (`dpg_bench.csv`), and GenEval 2's JSONL (`vqa_list` and `skills`).
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTRUCTION = "{question}\nAnswer with {form} only."
YES_NO = ("yes", "no")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NUMBERS = {word: number for number, word in enumerate(_WORDS)}
_FORM = '{"id": 1, "question": "Is there a cat?", "category": "entity", "answer": "yes", "depends_on": []}'


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Attributes:
        answer: what is right: "yes", "no" or a number, in digits.
        depends_on: the ids of the questions without whose right answers this one is wrong.
    """

    id: str
    text: str
    category: str
    answer: str = "yes"
    depends_on: tuple[str, ...] = ()

    @property
    def instruction(self) -> str:
        """What a judge is asked."""
        return INSTRUCTION.format(question=self.text, form="yes or no" if self.answer in YES_NO else "one number")

    def is_right(self, said: str) -> bool | None:
        """Whether an answer is the right one; None where it says neither, or several things."""
        words = re.findall(r"[a-z]+|\d+", said.lower())
        if self.answer in YES_NO:
            found = set(words[:1]) & set(YES_NO) or set(words) & set(YES_NO)
        else:
            numbers = {str(_NUMBERS[w]) if w in _NUMBERS else w for w in words if w in _NUMBERS or w.isdigit()}
            found = numbers or ({"0"} if {"no", "none"} & set(words) else set())
        return found == {self.answer} if len(found) == 1 else None


def questions_of(about: Mapping[str, Any], prompt: str | None) -> tuple[Question, ...]:
    """The questions of a prompt, from the other fields of its line. Raises ValueError with what is wrong."""
    where = f"the prompt {prompt!r}"
    try:
        if "vqa_list" in about:
            pairs = zip(about["vqa_list"], about["skills"], strict=True)
            found = [
                Question(str(number), str(text), str(skill), _answer(answer))
                for number, ((text, answer), skill) in enumerate(pairs, 1)
            ]
        else:
            found = [
                Question(
                    str(q["id"]),
                    str(q["question"]),
                    str(q["category"]),
                    _answer(q.get("answer", "yes")),
                    tuple(str(parent) for parent in q.get("depends_on", ())),
                )
                for q in about["questions"]
            ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where} has no list of questions ({reason}); each is of the form {_FORM}") from error
    ids = {q.id for q in found}
    if not found or len(ids) != len(found):
        raise ValueError(f"{where}: {'an id stands twice among' if found else 'it has no'} questions")
    for question in found:
        if missing := set(question.depends_on) - ids:
            raise ValueError(
                f"{where}: question {question.id} depends on {', '.join(sorted(missing))}, which is not there"
            )
    if _is_circular(found):
        raise ValueError(f"{where}: its questions depend on each other in a circle")
    return tuple(found)


def _answer(value: Any) -> str:
    word = str(value).strip().lower()
    word = str(_NUMBERS[word]) if word in _NUMBERS else word
    if word not in YES_NO and not word.isdigit():
        raise ValueError(f"the answer {value!r} is neither yes, no nor a number")
    return word


def _is_circular(questions: Sequence[Question]) -> bool:
    left = {q.id: set(q.depends_on) for q in questions}
    while free := [name for name, parents in left.items() if not parents & left.keys()]:
        for name in free:
            del left[name]
    return bool(left)


def count_right(questions: Sequence[Question], right: Mapping[str, bool | None]) -> dict[str, bool | None]:
    """DPG-Bench's rule: a question counts as wrong where one that it depends on is wrong, at any distance."""
    counted: dict[str, bool | None] = {}
    todo = list(questions)
    while todo:  # parents first, whatever the order in the file
        question = todo.pop(0)
        if not set(question.depends_on) <= counted.keys():
            todo.append(question)
            continue
        blocked = any(counted[parent] is False for parent in question.depends_on)
        counted[question.id] = False if blocked else right[question.id]
    return counted


def read_dpg_csv(path: Path) -> list[dict[str, Any]]:
    """The prompts of DPG-Bench's published CSV with their questions: a row a question. Raises ValueError with the row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8 text") from error
    names = {"item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"}
    if not rows or names - rows[0].keys():
        raise ValueError(f"{path}: no CSV of DPG-Bench; expected the columns {', '.join(sorted(names))}")
    prompts: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, 2):
        if number == 2 and not row["proposition_id"].strip().isdigit():
            continue  # a second line of headings, which the published scorer leaves out, too
        try:
            parents = [int(parent) for parent in row["dependency"].split(",")]
            question = {
                "id": int(row["proposition_id"]),
                "question": row["question_natural_language"],
                "category": row["tuple"].partition("(")[0].strip(),
                "depends_on": [parent for parent in parents if parent],  # 0: none
            }
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: no question of DPG-Bench ({error})") from error
        entry = prompts.setdefault(row["item_id"], {"prompt": row["text"].strip(), "questions": []})
        entry["questions"].append(question)
    for entry in prompts.values():
        ids = {q["id"] for q in entry["questions"]}
        for question in entry["questions"]:
            if dangling := set(question["depends_on"]) - ids:
                print(f"{path}: {question['question']!r} depends on {dangling}, which is not there", file=sys.stderr)
                question["depends_on"] = [parent for parent in question["depends_on"] if parent in ids]
    return list(prompts.values())
