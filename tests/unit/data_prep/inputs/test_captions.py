"""data_prep/inputs/captions.py: what a spec means, what a sample has, and how the draws fall."""

import json
import random
import subprocess
import sys
from collections import Counter

import pytest

from data_prep.inputs.captions import Caption, CaptionChoice

KEYS = [f"{index:09d}" for index in range(10_000)]
NAN, INF = float("nan"), float("inf")


def pick(spec: object, txt: str | None = None, **metadata: object) -> str | None:
    texts = {} if txt is None else {".txt": txt}
    caption = CaptionChoice.parse(spec).pick("000", texts, metadata)  # type: ignore[arg-type]
    return caption and caption.text


@pytest.mark.parametrize(
    ("spec", "txt", "metadata", "expected"),
    [
        (None, "t", {"caption": "c"}, "t"),
        (None, None, {"caption": "c"}, "c"),
        (None, None, {"text": "c"}, None),
        (None, " \n", {"caption": "c"}, " \n"),  # a blank txt hides the field, as it always has: empty_caption
        (None, None, {"caption": 7}, "7"),
        (None, None, {"caption": NAN}, None),
        (".txt", "t", {"caption": "c", ".txt": "f"}, "t"),
        (".txt", None, {"caption": "c", ".txt": "f"}, None),
        ("caption", "t", {"caption": "c"}, "c"),
        ("caption", "t", {}, None),
        ("re caption", "t", {"re caption": " kept as written "}, " kept as written "),
        ("n", "t", {"n": 1.5}, "1.5"),
        ("n", "t", {"n": INF}, None),
        ("n", "t", {"n": True}, None),
        ("n", "t", {"n": ["a"]}, "a"),
        ("n", "t", {"n": [" ", 3, "a", None]}, "a"),
        ("n", "t", {"n": [" ", ""]}, " "),
        ("n", "t", {"n": []}, None),
        ("n", "t", {"n": {"en": "a"}}, None),
        ("n", "t", {"n": None}, None),
        ("n", "t", {"n": ""}, ""),
        (["a", "b"], "t", {"b": "B"}, "B"),  # of several only those that are there ...
        (["a", "b"], "t", {"a": "  ", "b": "B"}, "B"),  # ... and not blank
        (["a", "b"], "t", {"a": "A", "b": "  "}, "A"),
        (["a", "b"], "t", {"a": "  "}, "  "),  # blank, not absent
        (["a", "b"], "t", {"a": None}, None),
        (["a", ".txt"], "t", {}, "t"),
        (["a", ".txt"], None, {".txt": "f"}, None),
    ],
)
def test_pick(spec: object, txt: str | None, metadata: dict, expected: str | None) -> None:
    assert pick(spec, txt, **metadata) == expected


def test_only_what_may_be_picked_is_read() -> None:
    specs = (None, ".txt", "a", "a=1,b=1", "a=1,.txt=1", ".Caption")
    reads = {spec: CaptionChoice.parse(spec).members for spec in specs}
    assert reads == {
        None: ("txt",),
        ".txt": ("txt",),
        "a": (),
        "a=1,b=1": (),
        "a=1,.txt=1": ("txt",),
        ".Caption": ("caption",),
    }


def draws(spec: object, keys: list[str] = KEYS, has: str = "abc") -> list[str | None]:
    choice = CaptionChoice.parse(spec)  # type: ignore[arg-type]
    drawn = [choice.pick(key, {".txt": "t"}, {name: name for name in has}) for key in keys]
    return [caption and caption.text for caption in drawn]


@pytest.mark.parametrize(
    ("spec", "has", "expected"),
    [
        ({"a": 0.8, ".txt": 0.2}, "abc", {"a": 0.8, "t": 0.2}),
        ({"a": 6, "b": 3, "c": 1}, "abc", {"a": 0.6, "b": 0.3, "c": 0.1}),
        ({"a": 6, "b": 3, "c": 1}, "bc", {"b": 0.75, "c": 0.25}),  # what is left shares by its weights
        (["a", "b", "c", ".txt"], "abc", {"a": 0.25, "b": 0.25, "c": 0.25, "t": 0.25}),
        ({"a": 1e9, "b": 1e-9}, "abc", {"a": 1.0}),
    ],
)
def test_drawn_shares_are_the_weights(spec: object, has: str, expected: dict[str, float]) -> None:
    shares = {name: count / len(KEYS) for name, count in Counter(draws(spec, has=has)).items()}
    assert shares == pytest.approx(expected, abs=0.015)  # three standard deviations


def test_a_draw_follows_from_the_key_alone() -> None:
    spec = {"a": 0.5, "b": 0.3, "c": 0.2}
    drawn = dict(zip(KEYS, draws(spec), strict=True))
    backwards = KEYS[::-1]
    random.seed(3)
    assert draws(spec, backwards) == [drawn[key] for key in backwards]
    program = (
        "from data_prep.inputs.captions import CaptionChoice; choice = CaptionChoice.parse('c=0.2,b=0.3,a=0.5');"
        "print(''.join(choice.pick(f'{i:09d}', {}, dict(a='a', b='b', c='c')).text for i in range(200)))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == "".join(str(drawn[key]) for key in KEYS[:200])
    assert "".join(str(drawn[key]) for key in KEYS[:20]) == "aaacbacbbacbaaabbaab"  # as ever: no run may draw anew


def test_a_name_falls_out_without_stirring_the_others() -> None:
    with_c, without_c = draws("a=1,b=1,c=2"), draws("a=1,b=1,c=2", has="ab")
    assert all(after == before for before, after in zip(with_c, without_c, strict=True) if before != "c")


def test_any_key_can_be_drawn_for() -> None:
    assert all(pick in ("a", "b") for pick in draws("a=1,b=1", ["", "\ud800", "a/b.c/é", "\0", "x" * 10**6]))


def test_neither_order_nor_scale_of_the_weights_matters() -> None:
    choices = [
        CaptionChoice.parse(spec)
        for spec in (
            {"a": 0.7, "b": 0.1, ".txt": 0.2},
            {".txt": 2, "b": 1, "a": 7},
            " b=0.1, a = 0.7,.txt=0.2",
            "a=7e3,b=1e3,.txt=2e3",
        )
    ]
    assert len(set(choices)) == 1
    assert CaptionChoice.parse(["a", "b"]) == CaptionChoice.parse(("b", "a")) == CaptionChoice.parse("a=3,b=3")


def test_the_setting_tells_choices_apart_and_gives_them_again() -> None:
    specs = [
        None,
        ".txt",
        "caption",
        ["a,b=c"],
        "a=1,b=2",
        ["a", "b", "c"],
        dict(zip("abcde", (7, 2, 7, 2, 3), strict=True)),
    ]
    choices = [CaptionChoice.parse(spec) for spec in specs]  # type: ignore[arg-type]
    settings = [choice.setting for choice in choices]
    assert json.loads(json.dumps(settings)) == settings
    assert [CaptionChoice.parse(setting) for setting in settings] == choices
    assert len({json.dumps(setting) for setting in settings}) == len(specs)
    assert settings[:3] == [None, {".txt": 1.0}, {"caption": 1.0}]


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("", "'' is no name"),
        ("  ", "'' is no name"),
        ({}, "names nothing"),
        ([], "names nothing"),
        ([""], "'' is no name"),
        ({"a": 1, " ": 1}, "' ' is no name"),
        ([3], "3 is no name"),
        (5, "is a int"),
        ("a=1,=2", "'' is no name"),
        ("a,b", "'a' has no weight"),
        ("a=1,b", "'b' has no weight"),
        ("a=1,", "'' has no weight"),
        ("a=1,b=much", "the weight of 'b' is 'much'"),
        ("a=1,b=", "the weight of 'b' is ''"),
        ("a=1,b=0", "the weight of 'b' is 0.0"),
        ("a=1,b=nan", "the weight of 'b' is nan"),
        ({"a": -1}, "the weight of 'a' is -1"),
        ({"a": INF}, "the weight of 'a' is inf"),
        ({"a": "1"}, "the weight of 'a' is '1'"),
        ({"a": None}, "the weight of 'a' is None"),
        ({"a": True}, "the weight of 'a' is True"),
        ({"a": 10**400}, "no number from 1e-09 to 1e+09"),
        (["a", "b", "a"], "'a' stands in it twice"),
        ("a=1,a=2", "'a' stands in it twice"),
    ],
)
def test_a_mistake_is_one_clear_line(spec: object, part: str) -> None:
    with pytest.raises(ValueError, match="captions ") as caught:
        CaptionChoice.parse(spec)  # type: ignore[arg-type]
    message = str(caught.value)
    assert part in message and "write a field of the json or .txt" in message and "\n" not in message


def test_a_list_is_a_choice_for_each_key() -> None:
    choice = CaptionChoice.parse(None)
    drawn = [choice.pick(key, {}, {"caption": ["a", " ", "b", "c"]}) for key in KEYS]
    shares = {text: count / len(KEYS) for text, count in Counter(caption.text for caption in drawn if caption).items()}
    assert shares == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, abs=0.015)
    assert {caption.field for caption in drawn if caption} == {"caption"}
    assert drawn == [choice.pick(key, {}, {"caption": ["a", " ", "b", "c"]}) for key in KEYS]


def test_a_text_member_of_any_name() -> None:
    texts = {".txt": "t", ".caption": "c"}
    assert CaptionChoice.parse(".caption").pick("0", texts, {}) == Caption(".caption", "c")
    assert CaptionChoice.parse(".CAPTION").pick("0", texts, {}) == Caption(".CAPTION", "c")
    assert CaptionChoice.parse(".text").pick("0", texts, {".text": "f"}) is None
