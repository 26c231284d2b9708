"""Sources: several with captions and filters of their own, and files that are wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from encoding import encode, jpeg, report, rows, write_pictures

from data_prep.inputs.sources import read_sources


def test_several_sources_each_with_captions_and_a_filter(tmp_path: Path, capsys) -> None:
    good, bad = {"aesthetic_score": 6, "pwatermark": 0.1}, {"aesthetic_score": 5, "pwatermark": 0.1}
    write_pictures(
        tmp_path / "a" / "0.tar",
        {
            "k0": (jpeg(96, 96), {"caption": "one", **good}),
            "k1": (jpeg(96, 96), {"caption": "two", **bad}),
            "k2": (jpeg(96, 96), {"caption": "three", **good, "pwatermark": 0.9}),
            "k3": (jpeg(96, 96), {"caption": "four", "pwatermark": 0.1}),
            "k4": (jpeg(160, 64), {"caption": "five", **good}),
        },
    )
    many = {f"m{i}": (jpeg(64, 64, i), {"long": f"long {i}", "short": f"short {i}"}) for i in range(60)}
    write_pictures(tmp_path / "b" / "0.tar", many)
    (tmp_path / "sources.yaml").write_text(
        f"""
        sources:
          first:
            tars: {tmp_path}/a
            filter: aesthetic >= 5.5 and watermark < 0.5 and aspect <= 2
          second:
            tars: ["{tmp_path}/b/*.tar"]
            captions: {{long: 0.75, short: 0.25}}
        """
    )
    root = tmp_path / "data"
    assert encode(root, "--sources", str(tmp_path / "sources.yaml")) == 0
    found = rows(root)
    assert found.pop("first/0/k0")["caption"] == "one"
    assert set(found) == {f"second/0/m{i}" for i in range(60)}
    drawn = Counter(row["caption"].split()[0] for row in found.values())
    assert 35 <= drawn["long"] <= 55  # three quarters
    assert all(row["caption"].split()[1] == key.partition("/m")[2] for key, row in found.items())
    whole = report(root)
    assert whole["sources"]["first"]["dropped"] == {
        "filtered by aesthetic >= 5.5": 1,
        "filtered by aspect <= 2": 1,
        "filtered by watermark < 0.5": 1,
        "no field aesthetic": 1,
    }
    assert whole["read"] == 65 == whole["written"] + 4
    lines = [json.loads(s) for s in (root / "reports" / "first" / "0.jsonl").read_text().splitlines()]
    assert [(r["key"], r["detail"]) for r in lines[:2]] == [("k1", "aesthetic_score = 5"), ("k2", "pwatermark = 0.9")]
    assert "first" in capsys.readouterr().out
    # Another source may join; one that is there may not change.
    write_pictures(tmp_path / "c" / "0.tar", {"n": (jpeg(64, 64), {"caption": "new"})})
    (tmp_path / "sources.yaml").write_text(
        f"sources: {{second: {{tars: {tmp_path}/b, captions: {{long: 0.75, short: 0.25}}}}, third: {{tars: {tmp_path}/c}}}}"
    )
    assert encode(root, "--sources", str(tmp_path / "sources.yaml")) == 0
    assert len(rows(root)) == 62
    (tmp_path / "sources.yaml").write_text(f"sources: {{second: {{tars: {tmp_path}/b, captions: long}}}}")
    assert encode(root, "--sources", str(tmp_path / "sources.yaml")) == 1
    assert "source second: there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sources: {}", "there are none"),
        ("sources: {a: {}}", "sources.a.tars: Field required"),
        ("sources: {a: {tars: x, filters: y}}", "sources.a.filters: Extra inputs are not permitted"),
        ("sources: {work: {tars: x}, b c: {tars: y}}", "a name has letters, digits, - and _ only"),
        ("sources: {a: {tars: x, filter: aesthetic = 5}}", "sources.a: "),
        ("sources: {a: {tars: x, captions: {long: 0}}}", "sources.a: captions"),
        ("sources: [", "is no YAML"),
        ("!!python/object/apply:os.system [id]", "is no YAML"),
    ],
)
def test_a_file_of_sources_that_is_wrong(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"s\.yaml") as error:
        read_sources(tmp_path / "s.yaml")
    assert words in str(error.value)
