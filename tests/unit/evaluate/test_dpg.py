"""Questions about pictures: the users' and the published files, DPG-Bench's rule, and the scores of a scripted judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.evaluate.__main__ import main
from pretrain.evaluate.pictures import prompts_of
from pretrain.evaluate.questions import Question, count_right, questions_of

from .conftest import Endpoint, completion, number_of


def ask(name: int, *parents: int, **more: Any) -> dict[str, Any]:
    return {"id": name, "question": f"{name}?", "category": "entity", "depends_on": list(parents), **more}


# ---- answers ----


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        ("yes", "yes", True),
        ("yes", "**Yes**.", True),
        ("yes", "No, there is no cat.", False),
        ("yes", "Yes, and no dog.", True),
        ("yes", "The answer is yes", True),
        ("yes", "Answer: no", False),
        ("yes", "I see a nose", None),
        ("yes", "It may be yes or no.", None),
        ("no", "No.", True),
        ("no", "yes", False),
        ("4", "four", True),
        ("4", "4", True),
        ("4", "There are four (4) cows.", True),
        ("4", "There are 3 cows.", False),
        ("4", "None.", False),
        ("4", "three or four", None),
        ("4", "many", None),
    ],
)
def test_what_an_answer_says(answer: str, said: str, right: bool | None) -> None:
    assert Question("1", "?", "c", answer).is_right(said) is right


def test_a_question_says_how_to_answer() -> None:
    assert Question("1", "Is it red?", "c").instruction == "Is it red?\nAnswer with yes or no only."
    assert Question("1", "How many?", "c", "4").instruction == "How many?\nAnswer with one number only."


def test_what_depends_on_a_wrong_answer_is_wrong() -> None:
    """Also at a distance, whatever the order; an answer that cannot be read says nothing of those below it."""
    questions = questions_of(
        {"questions": [ask(4, 3), ask(3, 2), ask(2, 1), ask(1), ask(5, 1, 6), ask(6), ask(7, 8), ask(8)]}, "p"
    )
    right = {"1": True, "2": False, "3": True, "4": True, "5": True, "6": False, "7": True, "8": None}
    expected = {"1": True, "2": False, "3": False, "4": False, "5": False, "6": False, "7": True, "8": None}
    assert count_right(questions, right) == expected


# ---- files ----

GENEVAL_2 = {
    "prompt": "four white bicycles",
    "atom_count": 3,
    "vqa_list": [
        ["How many bicycles are there?", "four"],
        ["Are the bicycles white?", "Yes"],
        ["Any bicycles?", "Yes"],
    ],
    "skills": ["count", "attribute", "object"],
}


def test_geneval_2s_lines_are_read() -> None:
    found = questions_of(GENEVAL_2, "p")
    assert [(q.id, q.category, q.answer) for q in found] == [
        *(("1", "count", "4"), ("2", "attribute", "yes"), ("3", "object", "yes")),
    ]


CSV = """item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language
id,the text,words,number,parents,broad,detailed,tuple,question
a,"A cat, asleep.",,1,0,entity,whole,entity - whole (cat),Is there a cat?
a,"A cat, asleep.",,2,1,entity,state,"entity - state (cat, asleep)",Is the cat asleep?
b,A red ball.,,1,0,entity,whole,entity - whole (ball),Is there a ball?
b,A red ball.,,2,"1, 9",attribute,color,"attribute - color (ball, red)",Is the ball red?
"""


def test_dpg_benchs_csv_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dpg_bench.csv"
    path.write_text(CSV)
    entries = prompts_of(path)
    assert [entry["prompt"] for entry in entries] == ["A cat, asleep.", "A red ball."]
    found = [questions_of(entry, entry["prompt"]) for entry in entries]
    assert found[0][1] == Question("2", "Is the cat asleep?", "entity - state", "yes", ("1",))
    assert found[1][1].depends_on == ("1",)
    assert "'Is the ball red?' depends on {9}, which is not there" in capsys.readouterr().err
    path.write_text(CSV.replace(",2,1,", ",second,1,"))
    with pytest.raises(ValueError, match=r"dpg_bench.csv, line 4: no question of DPG-Bench"):
        prompts_of(path)
    path.write_bytes(CSV.replace("cat", "chät").encode("latin-1"))
    with pytest.raises(ValueError, match=r"dpg_bench.csv is not UTF-8"):
        prompts_of(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no CSV of DPG-Bench; expected the columns dependency, item_id"):
        prompts_of(path)


@pytest.mark.parametrize(
    ("about", "line"),
    [
        ({}, "the prompt 'p' has no list of questions (no field 'questions'); each is of the form {\"id\": 1"),
        ({"questions": [{"id": 1, "question": "?"}]}, "(no field 'category')"),
        ({"questions": []}, "it has no questions"),
        ({"questions": [ask(1), ask(1)]}, "an id stands twice among questions"),
        ({"questions": [ask(1, 3)]}, "question 1 depends on 3, which is not there"),
        ({"questions": [ask(1, 2), ask(2, 1), ask(3)]}, "depend on each other in a circle"),
        ({"questions": [ask(1, answer="red")]}, "the answer 'red' is neither yes, no nor a number"),
        (GENEVAL_2 | {"skills": ["count"]}, "has no list of questions"),
    ],
)
def test_wrong_questions_are_one_line(about: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        questions_of(about, "p")
    assert line in str(error.value)


# ---- scores ----


def test_scores_by_question_by_category_and_in_all(endpoint: Endpoint, pictures: Path, tmp_path: Path) -> None:
    """Three prompts, two pictures each; the judge's answers by picture and question."""
    prompts = tmp_path / "prompts.jsonl"
    cat = [
        {"id": "cat", "question": "A cat?", "category": "entity - whole"},
        {"id": "asleep", "question": "Asleep?", "category": "entity - state", "depends_on": ["cat"]},
        {"id": "red", "question": "Red?", "category": "attribute - color"},
    ]
    lines = [
        {"prompt": "a cat", "questions": cat},
        {"prompt": "no dog", "questions": [{"id": 1, "question": "A dog?", "category": "entity", "answer": "no"}]},
        {"prompt": "cows", "vqa_list": [["How many cows?", "two"]], "skills": ["count"]},
    ]
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    says: dict[tuple[int, str], Any] = {
        (0, "A cat?"): "Yes.",
        (0, "Asleep?"): "yes",
        (0, "Red?"): "yes",
        (1, "A cat?"): "no",
        (1, "Asleep?"): "Yes",
        (1, "Red?"): "perhaps",
        (2, "A dog?"): "no",
        (3, "A dog?"): completion(None, refusal="no dogs"),
        (4, "How many cows?"): "2",
        (5, "How many cows?"): "three cows",
    }
    endpoint.reply = lambda asked: says[number_of(asked, pictures), asked.question.splitlines()[0]]
    command = ["--pictures", str(pictures), "--prompts", str(prompts), "--per-prompt", "2", "--metrics", "dpg"]
    command += ["--out", str(tmp_path / "out"), *endpoint.options()]
    assert main(command) == 0
    found = json.loads((tmp_path / "out/dpg.json").read_text())
    values, notes = found["values"], found["notes"]
    # a cat: 1 and 0 of 2 that can be read; no dog: 1 of the only one; cows: 1 and 0.
    assert values["score"]["value"] == pytest.approx((0.5 + 1 + 0.5) / 3) and values["score"]["count"] == 5
    assert values["all questions right"] == {"value": 0.6, "count": 5, "sem": pytest.approx((0.3 / 5) ** 0.5)}
    shown = {name: (value["value"], value["count"]) for name, value in values.items()}
    assert shown["entity"] == (0.8, 5) and shown["entity - whole"] == (0.5, 2)
    assert shown["entity - state"] == (1.0, 2)  # answers as they are, without the rule
    assert shown["attribute"] == shown["attribute - color"] == (1.0, 1) and shown["count"] == (0.5, 2)
    assert notes["score by question"]["a cat"] == {"cat": 0.5, "asleep": 0.5, "red": 1.0}
    assert (notes["refused"], notes["unparsable"], notes["prompts"]) == (1, 1, 3)
    assert found["scorer"]["question"] == "{question}\nAnswer with {form} only."
    assert found["scorer"]["judge"] == "a-judge" and len(endpoint.asked) == 10

    prompts.write_text(prompts.read_text().replace('"Red?"', '"Grey?"'))
    says |= {(0, "Grey?"): "no", (1, "Grey?"): "no"}
    assert main(command) == 0
    assert [asked.question.splitlines()[0] for asked in endpoint.asked[10:]] == ["Grey?", "Grey?"]


def test_prompts_without_questions_are_one_line(
    endpoint: Endpoint, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain.txt").write_text("a cat\n" * 6)
    command = ["--pictures", str(pictures), "--metrics", "dpg", "--out", str(tmp_path / "out"), *endpoint.options()]
    assert main([*command, "--prompts", str(tmp_path / "plain.txt")]) == 1
    assert "dpg: the prompt 'a cat' has no list of questions" in capsys.readouterr().err.splitlines()[-1]
    assert main(command) == 1
    assert "--prompts: dpg needs a file of prompts with their questions" in capsys.readouterr().err.splitlines()[-1]
    assert endpoint.asked == []
