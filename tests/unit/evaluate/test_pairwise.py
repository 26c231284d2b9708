"""pretrain/evaluate/pairwise.py: the judging page hides whose picture is whose, and its votes are counted for the right one."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import Opened

from data_prep.shapes import COLOURS, draw, scenes
from pretrain.console import run_one_of
from pretrain.evaluate import pairwise, pairwise_page
from pretrain.evaluate.pairwise import QUESTION
from pretrain.evaluate.votes import SIDES, Ballot, Vote, binomial_interval, cohen_kappa, fleiss_kappa, sign_test
from pretrain.sampling.jobs import Job, write_png

PAIRS = 9
SIDE = 48


def sample(folder: Path, prompts: list[str], images: list[Image.Image], first_seed: int = 0) -> Path:
    """A folder as `pretrain.sample` leaves it."""
    folder.mkdir()
    lines = []
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        job = Job(i, prompt, first_seed + i, {"steps": 20, "weights_fingerprint": folder.name})
        write_png(image, job.picture(folder), job.description)
        lines.append({"file": job.picture(folder).name, **job.description, "run": folder.name, "step": 1})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Captioned shapes; the second folder's are turned upside down, and darker by one step."""
    drawn = list(scenes(PAIRS, 0))
    images = [draw(scene, SIDE) for scene in drawn]
    prompts = [scene.caption for scene in drawn]
    others = [image.rotate(180).point(lambda v: max(0, v - 1)) for image in images]
    return sample(tmp_path / "first_model", prompts, images), sample(tmp_path / "second_model", prompts, others)


def command(*words: Any) -> int:
    return run_one_of("evaluate", "", {"pairwise": pairwise.__name__}, ["pairwise", *map(str, words)])


def page_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="page">(.*)</script>', html)
    assert found
    return json.loads(found[1])


def picture(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def make(folders: tuple[Path, Path], *words: Any) -> tuple[str, dict[str, Any]]:
    out = folders[0].parent / "judging.html"
    assert command(*folders, "--out", out, *words) == 0
    html = out.read_text(encoding="utf-8")
    return html, page_of(html)


def sides_of(page: dict[str, Any], folder: Path) -> list[str]:
    """On which side of each pair the folder's picture stands, by its pixels."""
    lines = map(json.loads, (folder / "prompts.jsonl").read_text().splitlines())
    own = {line["prompt"]: pixels(Image.open(folder / line["file"])) for line in lines}
    sides = []
    for pair in page["pairs"]:
        (side,) = [s for s in ("left", "right") if np.array_equal(pixels(picture(pair[s])), own[pair["prompt"]])]
        sides.append(side)
    return sides


def ballot(page: dict[str, Any], judge: str, choices: list[str]) -> dict[str, Any]:
    """What the page's script exports."""
    votes = [{"pair": p["id"], "choice": choice} for p, choice in zip(page["pairs"], choices, strict=False)]
    about = {"page": page["id"], **{k: page[k] for k in ("seed", "question", "side")}, "pairs": len(page["pairs"])}
    return {**about, "judge": judge, "votes": votes}


def write(folder: Path, content: dict[str, Any], name: str = "") -> Path:
    path = folder / f"votes_{name or content['judge']}.json"
    path.write_text(json.dumps(content))
    return path


# ---- the page ----


def test_the_page_holds_its_pictures_and_loads_nothing(folders) -> None:
    html, page = make(folders)
    opened = Opened(html)
    assert opened.sources == [] and "http:" not in html and "https:" not in html
    assert html.count("default-src 'none'; img-src data:;") == 1
    assert len(page["pairs"]) == PAIRS and page["question"] == QUESTION
    first, second = sides_of(page, folders[0]), sides_of(page, folders[1])
    assert all({a, b} == {"left", "right"} for a, b in zip(first, second, strict=True))


def test_the_page_does_not_tell_whose_picture_is_whose(folders) -> None:
    html, page = make(folders)
    for folder in folders:
        assert folder.name not in html
        for path in folder.glob("*.png"):
            assert path.name not in html and path.stem not in html
    assert set(page) == {"id", "seed", "question", "side", "pairs"}
    for pair in page["pairs"]:
        assert set(pair) == {"id", "prompt", "left", "right"}
        assert re.fullmatch("[0-9a-f]{16}", pair["id"])
        for side in ("left", "right"):  # the coder's settings are the same, and nothing else is written
            assert set(picture(pair[side]).info) <= {"loop", "background", "timestamp", "duration"}
            assert b"steps" not in base64.b64decode(pair[side].partition(",")[2])


def test_order_and_sides_follow_from_the_seed(folders) -> None:
    html, page = make(folders)
    assert make(folders)[0] == html
    others = [make(folders, "--seed", seed)[1] for seed in range(1, 20)]
    orders = {tuple(pair["id"] for pair in other["pairs"]) for other in others}
    assert len(orders) > 15 and {frozenset(order) for order in orders} == {frozenset(p["id"] for p in page["pairs"])}
    lefts = [sides_of(other, folders[0]).count("left") for other in others]
    assert set(lefts) == {PAIRS // 2, PAIRS // 2 + 1}
    assert len({other["id"] for other in others} | {page["id"]}) == 20  # votes are kept under it


def test_a_page_of_other_pictures_question_or_size_has_another_name(folders) -> None:
    names = [make(folders)[1]["id"], make(folders, "--question", "Which is sharper?")[1]["id"]]
    names += [make(folders, "--pairs", 4)[1]["id"], make(folders, "--side", 16)[1]["id"]]
    changed = next(folders[0].glob("*.png"))
    Image.new("RGB", (SIDE, SIDE)).save(changed)
    assert len({*names, make(folders)[1]["id"]}) == 5


def test_a_number_of_pairs_and_a_side(folders) -> None:
    _, page = make(folders, "--pairs", 4, "--side", 16)
    assert len(page["pairs"]) == 4
    assert {picture(pair[s]).size for pair in page["pairs"] for s in ("left", "right")} == {(16, 16)}
    assert len(make(folders, "--pairs", 1000)[1]["pairs"]) == PAIRS


def test_a_text_ends_no_element(folders, tmp_path) -> None:
    hostile = '</script><script>alert("x")</script> <!-- & ü 猫'
    images = [Image.new("RGB", (16, 16), COLOURS[name]) for name in ("red", "blue")]
    a, b = (sample(tmp_path / name, [hostile], [image]) for name, image in zip("ab", images, strict=True))
    html, page = make((a, b), "--question", hostile)
    assert page["pairs"][0]["prompt"] == page["question"] == hostile
    assert Opened(html).tags.count("script") == 2


def test_the_script_exports_what_the_sum_reads(folders) -> None:
    """Names in the script are those of the ballot; the test of a browser is by hand (docs/evaluation.md shows it)."""
    html, _ = make(folders)
    exported = re.search(r"const ballot = \{(.*?)\};", html, re.DOTALL)
    assert exported
    words = re.sub(r"votes: votes\.map.*\}\)\)", "votes", exported[1].replace("\n", " "))
    assert {word.partition(":")[0].strip() for word in words.split(",")} == set(Ballot.model_fields)
    assert re.search(r"\(\{pair: pairs\[i\]\.id, choice\}\)", exported[1]) and set(Vote.model_fields) == {
        "pair",
        "choice",
    }
    keys = re.search(r"const KEYS = \{(.*)\};", html)
    assert keys and set(re.findall(r': "(\w+)"', keys[1])) == set(SIDES)
    offered = Counter(value for name, value in Opened(html).attributes if name == "data-choice")
    assert offered == {"left": 2, "right": 2, "tie": 1}
    ids = {value for name, value in Opened(html).attributes if name == "id"}
    assert set(re.findall(r'at\("(\w+)"\)', html)) <= ids


# ---- pairs ----


def test_pairs_have_the_same_seed_or_else_follow_the_seeds(tmp_path, capsys) -> None:
    grey = [Image.new("RGB", (16, 16), (level,) * 3) for level in range(0, 240, 10)]
    a = sample(tmp_path / "a", ["cat", "cat", "dog", "a fish", "cow"], grey[:5])
    b = sample(tmp_path / "b", ["owl", "cat", "cat", "dog", "cow"], [*grey[10:14], grey[4]])
    _, page = make((a, b))
    shades = {
        frozenset(int(pixels(picture(pair[s]))[0, 0, 0]) for s in ("left", "right")): pair["prompt"]
        for pair in page["pairs"]
    }
    # Seed 1 is in both; then what is left, 0 of a and 2 of b.
    assert shades == {frozenset({10, 110}): "cat", frozenset({0, 120}): "cat", frozenset({20, 130}): "dog"}
    said = capsys.readouterr().out
    assert f"{a}: left out 1 picture without partner: 'a fish'" in said
    assert f"{b}: left out 1 picture without partner: 'owl'" in said
    assert "left out 1 pair of equal pictures" in said


def test_many_pictures_without_partner_are_counted(folders, tmp_path, capsys) -> None:
    more = [scene.caption for scene in scenes(PAIRS, 0)] + [f"text {i}" for i in range(10)]
    larger = sample(tmp_path / "larger", more, [Image.new("RGB", (SIDE, SIDE), (i, 0, 0)) for i in range(len(more))])
    make((folders[0], larger))
    assert "10 pictures without partner: 'text 0', 'text 1', 'text 2' and 7 more" in capsys.readouterr().out


def test_pictures_of_different_size_are_said(folders, tmp_path, capsys) -> None:
    prompts = [scene.caption for scene in scenes(PAIRS, 0)]
    larger = sample(tmp_path / "larger", prompts, [draw(scene, 64) for scene in scenes(PAIRS, 0)])
    make((folders[0], larger))
    said = capsys.readouterr().out
    assert f"{PAIRS} pairs of pictures of different size, such as 48×48 and 64×64 px" in said and "--side" in said


# ---- the sum ----


def other(side: str) -> str:
    return {"left": "right", "right": "left"}[side]


def test_votes_count_for_the_picture_that_was_chosen(folders, tmp_path, capsys) -> None:
    _, page = make(folders, "--seed", 3)
    first = sides_of(page, folders[0])
    ann = [*first[:6], *map(other, first[6:8]), "tie"]  # 6 for the first, 2 for the second
    files = [write(tmp_path, ballot(page, "Ann", ann))]
    assert command(*folders, "--votes", *files, "--out", tmp_path / "sum.json") == 0
    assert re.search(r"votes of 1 judge +6 +2 +1 +75\.0% \(34\.9 to 96\.8%\) +0\.289\n", capsys.readouterr().out)
    report = json.loads((tmp_path / "sum.json").read_text())
    assert report["votes"] == {
        "a_wins": 6,
        "b_wins": 2,
        "ties": 1,
        "a_share": 0.75,
        "interval": list(binomial_interval(6, 8)),
        "p": sign_test(6, 2),
    }
    assert report["judges"][0]["left_share"] == pytest.approx(ann.count("left") / 8)
    assert [pair["prompt"] for pair in report["by_pair"]] == [pair["prompt"] for pair in page["pairs"]]
    assert [pair["a_wins"] - pair["b_wins"] for pair in report["by_pair"]] == [1] * 6 + [-1] * 2 + [0]


def test_several_judges(folders, tmp_path, capsys) -> None:
    _, page = make(folders)
    first = sides_of(page, folders[0])
    votes = {
        "Ann": first,
        "Bo": [*first[:5], *map(other, first[5:])],
        "Cy": [*first[:3], *map(other, first[3:7])],  # stopped before the last two
    }
    files = [write(tmp_path, ballot(page, judge, choices)) for judge, choices in votes.items()]
    assert command(*folders, "--votes", *files, "--out", tmp_path / "sum.json") == 0
    report = json.loads((tmp_path / "sum.json").read_text())
    assert (report["votes"]["a_wins"], report["votes"]["b_wins"]) == (9 + 5 + 3, 4 + 4)
    # Three pairs by 3 : 0, two by 2 : 1; two by 1 : 2; two by 1 : 1.
    assert {k: report["pairs"][k] for k in ("a_wins", "b_wins", "ties")} == {"a_wins": 5, "b_wins": 2, "ties": 2}
    assert [judge["judge"] for judge in report["judges"]] == list(votes)
    cohen = {tuple(two["judges"]): two for two in report["agreement"]["cohen"]}
    assert cohen["Ann", "Bo"] == {"judges": ["Ann", "Bo"], "pairs": 9, "alike": 5 / 9, "kappa": 0.0}
    bo_cy = cohen_kappa(list("aaaaabb"), list("aaabbbb"))
    assert cohen["Bo", "Cy"] == {"judges": ["Bo", "Cy"], "pairs": 7, "alike": 5 / 7, "kappa": bo_cy}
    rows = [*["aaa"] * 3, *["aab"] * 2, *["abb"] * 2]
    assert report["agreement"]["fleiss"] == {"pairs": 7, "kappa": fleiss_kappa(rows)}
    said = capsys.readouterr().out
    assert "Cy has judged 7 of 9 pairs" in said and "Fleiss' kappa of all judges" in said


def test_ties_alone(folders, tmp_path, capsys) -> None:
    _, page = make(folders)
    files = [write(tmp_path, ballot(page, judge, ["tie"] * PAIRS)) for judge in ("Ann", "Bo")]
    assert command(*folders, "--votes", *files, "--out", tmp_path / "sum.json") == 0
    said = capsys.readouterr().out
    assert "none is untied" in said and "none, as all votes are the same on 9 pairs, 100% alike" in said
    report = json.loads((tmp_path / "sum.json").read_text())
    assert report["votes"]["a_share"] is None and report["votes"]["interval"] == [0.0, 1.0]


# ---- figures ----


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [
        (682, 925, 0.7076683, 0.7654066),  # Conover 1971, p. 97: the example of R's binom.test
        (8, 10, 0.4439045, 0.9747893),
        (0, 10, 0.0, 0.3084971),  # 1 - 0.025 ** (1 / 10)
        (10, 10, 0.6915029, 1.0),
        (174, 330, 0.4718548, 0.5821969),  # the paper's Fig. 8, were its 660 comparisons halved
        (180, 330, 0.4900139, 0.6000721),
        (0, 0, 0.0, 1.0),
    ],
)
def test_clopper_pearson(wins, n, low, high) -> None:
    """The values are SciPy 1.17's `binomtest(wins, n).proportion_ci(0.95, "exact")`."""
    assert binomial_interval(wins, n) == pytest.approx((low, high), abs=5e-8)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (8, 2, 0.109375),
        (2, 8, 0.109375),
        (10, 0, 2 / 1024),
        (5, 5, 1.0),
        (0, 0, 1.0),
        (31, 16, 0.0399860568),
        (174, 156, 0.3493819041),
        (180, 150, 0.1102607871),
        (347, 313, 0.1989221436),
        (360, 300, 0.02157234823),
        (682, 243, 7.0872907752e-49),
    ],
)
def test_binomial_test(wins, losses, p) -> None:
    """The values are SciPy 1.17's `binomtest(wins, wins + losses, 0.5).pvalue`."""
    assert sign_test(wins, losses) == pytest.approx(p, rel=1e-9)


def test_cohens_kappa() -> None:
    """Fifty grant proposals by two readers: 20 both yes, 15 both no, 5 and 10 apart."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, first) == 1
    assert cohen_kappa(["tie"] * 3, ["tie"] * 3) is None


FLEISS = """
    0 0 0 0 14
    0 2 6 4 2
    0 0 3 5 6
    0 3 9 2 0
    2 2 8 1 1
    7 7 0 0 0
    3 2 6 3 0
    2 5 3 2 2
    6 5 2 1 0
    0 2 2 3 7
"""


def test_fleiss_kappa() -> None:
    """Ten subjects, fourteen raters, five categories: the textbook table, whose kappa is 0.210."""
    rows = [
        [name for name, n in zip("abcde", row.split(), strict=True) for _ in range(int(n))]
        for row in FLEISS.strip().splitlines()
    ]
    assert fleiss_kappa(rows) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([["a", "a"], ["b", "b"]]) == 1
    assert fleiss_kappa([["a", "a"], ["a", "a"]]) is None


# ---- mistakes, one line each ----


def cut(folder: Path) -> None:
    path = sorted(folder.glob("*.png"))[2]
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda a: (a / "prompts.jsonl").unlink(),
            "prompts.jsonl is not there: give a folder that python -m pretrain.sample",
        ),
        (
            lambda a: (a / "prompts.jsonl").write_text('{"file": "x.png"}\n'),
            "prompts.jsonl, line 1: prompt: Field required",
        ),
        (lambda a: (a / "prompts.jsonl").write_text("{}\nno"), "prompts.jsonl, line 1: file: Field required"),
        (lambda a: (a / "prompts.jsonl").write_bytes(b"\xff\n"), "prompts.jsonl, line 1: Invalid JSON"),
        (lambda a: (a / "prompts.jsonl").write_text(""), "no prompt is both in"),
        (
            lambda a: sorted(a.glob("*.png"))[2].unlink(),
            "1 of the 9 pictures in prompts.jsonl are not there, the first is 000002_",
        ),
        (cut, "cannot be read as a picture"),
        (lambda a: sorted(a.glob("*.png"))[2].write_bytes(b""), "cannot be read as a picture"),
    ],
)
def test_unusable_folders(folders, capsys, spoil: Callable[[Path], None], words: str) -> None:
    spoil(folders[0])
    assert command(*folders, "--out", folders[0].parent / "judging.html") == 1
    error = capsys.readouterr().err
    assert words in error and str(folders[0]) in error and error.count("\n") == 1
    assert not (folders[0].parent / "judging.html").exists()


def test_equal_folders(folders, capsys) -> None:
    assert command(folders[0], folders[0], "--out", folders[0].parent / "judging.html") == 1
    assert f"hold the same pictures ({PAIRS} pairs, all equal)" in capsys.readouterr().err


def test_a_page_that_no_browser_opens(folders, capsys, monkeypatch) -> None:
    size = sum(len(pair[s]) for pair in make(folders)[1]["pairs"][:4] for s in ("left", "right"))
    monkeypatch.setattr(pairwise_page, "LARGEST", size)
    assert command(*folders, "--out", folders[0].parent / "large.html") == 1
    assert "give --pairs 4 at most, or a smaller --side" in capsys.readouterr().err


def doubled(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "votes": [content["votes"][0], *content["votes"]]}


def strange(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "votes": [{"pair": "0" * 16, "choice": "tie"}, *content["votes"]]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: {**c, "page": "0" * 16}, "votes of another page than that of"),
        (lambda c: {**c, "seed": 1}, "votes of another page than that of"),
        (lambda c: {**c, "pairs": 1000}, "votes of another page than that of"),
        (strange, "its page has no pair 0000000000000000"),
        (doubled, "has 2 votes, expected one"),
        (lambda c: {**c, "votes": []}, "holds no votes as the judging page exports them (votes: "),
        (
            lambda c: {**c, "votes": [{**c["votes"][0], "choice": "a"}]},
            "(votes.0.choice: Input should be 'left', 'right' or 'tie'",
        ),
        (lambda c: {"judge": "Ann"}, "(page: Field required"),
        (lambda c: {**c, "more": 1}, "(more: Extra inputs are not permitted"),
    ],
)
def test_unusable_votes(folders, tmp_path, capsys, change, words: str) -> None:
    _, page = make(folders)
    path = write(tmp_path, change(ballot(page, "Ann", ["left"] * PAIRS)), "Ann")
    assert command(*folders, "--votes", path, "--out", tmp_path / "sum.json") == 1
    error = capsys.readouterr().err
    assert words in error and str(path) in error and error.count("\n") == 1
    assert not (tmp_path / "sum.json").exists()


def test_votes_of_two_pages_or_of_one_judge_twice(folders, tmp_path, capsys) -> None:
    (_, page), (_, later) = make(folders), make(folders, "--seed", 1)
    ann, bo, again = (
        write(tmp_path, ballot(page, "Ann", ["left"] * PAIRS)),
        write(tmp_path, ballot(later, "Bo", ["left"] * PAIRS)),
        write(tmp_path, ballot(page, " ann ", ["right"] * PAIRS), "again"),
    )
    out = ("--out", tmp_path / "sum.json")
    assert command(*folders, "--votes", ann, bo, *out) == 1
    assert f"{bo}: votes of another page ({later['id']}) than {ann} ({page['id']})" in capsys.readouterr().err
    assert command(*folders, "--votes", ann, again, *out) == 1
    assert f"{again}: the votes of judge ' ann ' are already in {ann}" in capsys.readouterr().err
    assert command(folders[1], folders[0], "--votes", ann, *out) == 1
    assert "unchanged and in the same order" in capsys.readouterr().err
    assert command(*folders, "--votes", tmp_path / "none.json", *out) == 1
    assert "none.json: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pairs", 0], "--pairs 0: must be at least 1"),
        (["--side", 8], "--side 8: must be at least 16"),
        (["--seed", -1], "--seed -1: must be at least 0"),
        (["--question", " "], "--question: is empty"),
        (["--votes", "a.json", "--seed", 0], "--seed: is a setting of the page, which the votes carry with them"),
    ],
)
def test_options_without_a_meaning(folders, capsys, words: list[Any], said: str) -> None:
    assert command(*folders, *words, "--out", folders[0].parent / "out") == 1
    assert said in capsys.readouterr().err
