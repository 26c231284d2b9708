"""Judges: an endpoint that errs, stalls, refuses and talks nonsense; nothing asked twice."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.evaluate.__main__ import main
from pretrain.evaluate.judge import Answer, Interview
from pretrain.evaluate.judge_endpoint import EndpointJudge
from pretrain.evaluate.metric import Picture

from .conftest import Endpoint, completion, number_of


def judge(endpoint: Endpoint, **more: Any) -> EndpointJudge:
    options = {"concurrency": 4, "timeout": 20.0, "tries": 5, "tokens": 16, "key": None, **more}
    return EndpointJudge(endpoint.url, "a-judge", **options)


@pytest.fixture
def picture(pictures: Path) -> Picture:
    return Picture(pictures / "0.png", "0")


def in_turn(*replies: Any) -> Callable[[Any], Any]:
    left = iter(replies)
    return lambda asked: next(left)


# ---- one question ----


def test_what_may_pass_is_asked_again(endpoint: Endpoint, picture: Picture) -> None:
    trouble = [(500, {}, b""), (503, {}, b""), (429, {"Retry-After": "0"}, b""), "drop", (200, {}, b"<html>")]
    endpoint.reply = in_turn(*trouble, completion("it is red"))
    assert judge(endpoint, tries=6).ask(picture, "colour?") == Answer("it is red")
    assert len(endpoint.asked) == 6 and len(set(endpoint.asked)) == 1
    assert (endpoint.asked[0].model, endpoint.asked[0].question) == ("a-judge", "colour?")


def test_a_stalling_server_is_asked_again(endpoint: Endpoint, picture: Picture) -> None:
    endpoint.reply = lambda asked: "stall" if len(endpoint.asked) == 1 else "yes"
    patient = judge(endpoint, tries=60, timeout=0.5)  # on a busy machine more than one request may end so
    assert patient.ask(picture, "?") == Answer("yes") and len(endpoint.asked) >= 2


def test_a_server_says_how_long_to_wait(endpoint: Endpoint, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    busy = (429, {"Retry-After": "7"}, b"")
    endpoint.reply = in_turn(busy, (503, {"Retry-After": "600"}, b""), (500, {"Retry-After": "soon"}, b""), "yes")
    assert judge(endpoint).ask(picture, "?").text == "yes"
    assert waits == pytest.approx([7.0, 60.0, 0.04])


@pytest.mark.parametrize("reply", [(500, {}, b""), "drop", (200, {}, b'{"choices": []}')])
def test_silence_ends(endpoint: Endpoint, picture: Picture, reply: Any) -> None:
    endpoint.reply = lambda asked: reply
    with pytest.raises(ValueError, match=r"/v1 gave no answer about 0.png in 3 tries \(.+\); look at the server"):
        judge(endpoint, tries=3).ask(picture, "?")
    assert len(endpoint.asked) == 3


def test_nobody_listens(endpoint: Endpoint, picture: Picture) -> None:
    nowhere = EndpointJudge("http://127.0.0.1:9/v1", "m", None, concurrency=1, timeout=5, tries=2, tokens=1)
    with pytest.raises(ValueError, match=r"gave no answer about 0.png in 2 tries \(.*refused"):
        nowhere.ask(picture, "?")


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (400, "answers 400 Bad Request: the server does not take this request (too long)"),
        (401, "put the key into JUDGE_API_KEY"),
        (404, "look at --judge-url (it ends in /v1) and --judge-model"),
    ],
)
def test_a_users_mistake_is_not_repeated(endpoint: Endpoint, picture: Picture, status: int, line: str) -> None:
    endpoint.reply = lambda asked: (status, {}, b"too\nlong")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        judge(endpoint).ask(picture, "?")
    assert line in str(error.value) and len(endpoint.asked) == 1


@pytest.mark.parametrize(
    "reply",
    [
        completion(None, refusal="not this one"),
        completion("", finish_reason="content_filter"),
        (400, {}, b'{"error": {"code": "content_filter", "message": "blocked"}}'),
    ],
)
def test_refusals_are_answers(endpoint: Endpoint, picture: Picture, reply: Any) -> None:
    endpoint.reply = lambda asked: reply
    assert judge(endpoint).ask(picture, "?").refused and len(endpoint.asked) == 1


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("I'm sorry, but I can't assist with that.", "refused"),
        ("I cannot rate this picture.", "refused"),
        ("I am unable to judge people’s faces", "refused"),
        ("I can’t really help here", "refused"),
        ("<think>I'm sorry for the cat</think>A fine picture.", "unparsable"),
        ("It is hard to say what I cannot see.", "unparsable"),
        ("", "unparsable"),
    ],
)
def test_refusals_in_prose(text: str, kind: str) -> None:
    assert Answer(text).kind == kind


def test_the_key_comes_from_the_environment(
    endpoint: Endpoint, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--pictures", str(pictures), "--metrics", "sctf", *endpoint.options()]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    monkeypatch.setenv("JUDGE_API_KEY", "sesame")
    assert main([*command, "--out", str(tmp_path / "b")]) == 0
    assert Counter(asked.key for asked in endpoint.asked) == {None: 6, "Bearer sesame": 6}
    written = [p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()]
    assert len(written) > 3 and not any(b"sesame" in content for content in written)


# ---- many questions ----


def test_as_many_at_once_as_allowed(endpoint: Endpoint, pictures: Path, tmp_path: Path) -> None:
    """Four questions wait for each other, so that fewer at once would never end; a fifth never comes beside them."""
    meeting, inside, most = threading.Barrier(4, timeout=60), [0], [0]
    lock = threading.Lock()

    def reply(asked: Any) -> str:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        meeting.wait()
        with lock:
            inside[0] -= 1
        return asked.question

    endpoint.reply = reply
    asked = [(Picture(pictures / f"{i}.png", str(i)), f"{i} {j}") for i in range(6) for j in range(2)]
    found = Interview(judge(endpoint, concurrency=4), tmp_path).ask(asked)
    assert [answer.text for answer in found] == [question for _, question in asked]
    assert most[0] <= 4 and len(endpoint.asked) == 12


def test_answers_outlive_a_failure(endpoint: Endpoint, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    """The endpoint dies after four answers: one line; repeated, only what has no answer is asked."""
    command = [
        "--pictures",
        str(pictures),
        "--out",
        str(tmp_path / "out"),
        "--metrics",
        "sctf",
        *endpoint.options(tries=2),
    ]
    endpoint.reply = lambda asked: "Score: 7" if len(endpoint.asked) <= 4 else (502, {}, b"")
    assert main([*command, "--judge-concurrency", "1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "sctf: " in line and "gave no answer about 4.png in 2 tries (502 Bad Gateway)" in line
    assert not (tmp_path / "out/sctf.json").exists()
    before = len(endpoint.asked)
    endpoint.reply = lambda asked: "Score: 7"
    assert main(command) == 0
    assert sorted(number_of(asked, pictures) for asked in endpoint.asked[before:]) == [4, 5]
    assert json.loads((tmp_path / "out/sctf.json").read_text())["values"]["score"]["count"] == 6


def test_a_kill_loses_no_answer(endpoint: Endpoint, pictures: Path, tmp_path: Path) -> None:
    """A real process is killed while a question is open: the answers that it had are not asked for again."""
    command = ["--pictures", str(pictures), "--out", str(tmp_path / "out"), "--metrics", "sctf", *endpoint.options()]
    sixth = threading.Event()

    def reply(asked: Any) -> str:
        if len(endpoint.asked) < 5:
            return "Score: 6"
        sixth.set()
        return "stall"

    endpoint.reply = reply
    words = [*command, "--judge-concurrency", "1"]
    process = multiprocessing.get_context("fork").Process(target=main, args=(words,))
    process.start()
    try:
        assert sixth.wait(300)
    finally:
        process.kill()
        process.join()
    endpoint.reply = lambda asked: "Score: 6"
    assert main(command) == 0
    times = Counter(number_of(asked, pictures) for asked in endpoint.asked)
    assert times == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 1}  # the open one has had no answer
    found = json.loads((tmp_path / "out/sctf.json").read_text())
    assert found["values"]["score"] == {"value": 6.0, "count": 6, "sem": 0.0}
    assert main(command) == 0 and len(endpoint.asked) == 7


def test_a_server_elsewhere_goes_on(endpoint: Endpoint, pictures: Path, tmp_path: Path) -> None:
    asked = [(Picture(pictures / "0.png", "0"), "?")]
    Interview(judge(endpoint), tmp_path).ask(asked)
    elsewhere = EndpointJudge("http://other/v1", "a-judge", None, concurrency=4, timeout=1, tries=1, tokens=16)
    assert Interview(elsewhere, tmp_path).ask(asked) == [Answer("yes")]


# ---- what is given ----


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--judge-url", "http://x/v1"], "--judge-model: needed with --judge-url"),
        (
            ["--judge-url", "file:///etc", "--judge-model", "m"],
            "--judge-url file:///etc: must be the endpoint's address",
        ),
        (["--judge-url", "http://x", "--judge-folder", "f"], "--judge-url and --judge-folder: give one of them"),
        (["--judge-url", "http://x", "--judge-concurrency", "0"], "--judge-concurrency 0: must be more than 0"),
    ],
)
def test_mistakes_are_one_line(pictures: Path, tmp_path: Path, options: list[str], line: str, capsys: Any) -> None:
    assert main(["--pictures", str(pictures), "--out", str(tmp_path), "--metrics", "sctf", *options]) == 1
    assert line in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "no judge; give --judge-url URL --judge-model NAME, or --judge-folder FOLDER"),
        (
            ["--judge-folder", "/nowhere"],
            "--judge-folder /nowhere: no model that can be loaded (no weights at /nowhere",
        ),
    ],
)
def test_without_a_judge_nothing_is_run(
    pictures: Path, tmp_path: Path, options: list[str], reason: str, capsys: Any
) -> None:
    assert main(["--pictures", str(pictures), "--out", str(tmp_path), "--metrics", "sctf", *options]) == 0
    assert f"| sctf | not run: {reason}" in capsys.readouterr().out
