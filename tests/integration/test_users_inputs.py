"""Inputs as users have them, through the encode command: what is written, what is said, and when."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from encoding import encode, jpeg, report, rows
from support import contents

from data_prep import schema, verify
from data_prep.inputs import folders
from data_prep.worker import encoding
from data_prep.worker.claims import Claims
from data_prep.worker.parts import whole_parts

pytestmark = pytest.mark.usefixtures("one_thread")
PICTURES = [jpeg(64, 64, n) for n in range(4)]
Members = list[tuple[str, bytes]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """All that was printed since the last call, errors last."""
    return lambda: "".join(capsys.readouterr())


def write(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, text: str = "a red circle", **fields: object) -> Members:
    """Members of samples: picture and text, and a json where there are fields."""
    made: Members = []
    for n in range(count):
        made += [(f"{n:03d}.jpg", PICTURES[n % 4]), (f"{n:03d}.txt", text.encode())]
        made += [(f"{n:03d}.json", json.dumps(fields).encode())] if fields else []
    return made


def keys(root: Path) -> set[str]:
    return {key.partition("/")[2] for key in rows(root)}


def test_a_tar_as_find_and_tar_make_it(tmp_path: Path, said: Callable[[], str]) -> None:
    """By GNU tar itself, from a folder in an order that is not sorted; and again as the message says."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    members = samples(33)
    for name, data in members:
        (folder / name).write_bytes(data)
    names = [name for name, _ in members]
    random.Random(0).shuffle(names)
    tar = tmp_path / "x.tar"
    subprocess.run(["tar", "cf", tar, "-C", folder, *names], check=True)
    root = tmp_path / "data"
    assert encode(root, "--input", str(tar)) == 1
    words = said()
    assert "warning: images: the first" in words and "have members that lie apart" in words
    assert "WARNING: more than half is dropped (unsorted_tar 1)" in words and "tar --sort=name" in words
    assert report(root)["dropped"] == {"unsorted_tar": 1} and report(root)["read"] == 1
    subprocess.run(["tar", "--sort=name", "-cf", tar, "-C", folder, "."], check=True)
    assert encode(root, "--input", str(tar), "--changed", "remake") == 0
    assert len(rows(root)) == 33 and "WARNING" not in said()


def test_captions_are_counted_and_names_that_are_never_there_are_said_at_once(
    tmp_path: Path, said: Callable[[], str]
) -> None:
    write(tmp_path / "t" / "0.tar", samples(12, caption="a blue square", url="https://x"))
    root = tmp_path / "data"
    assert encode(root, "--input", str(tmp_path / "t"), "--captions", "capton=0.5,.txt=0.5") == 0
    words = said()
    assert "/t/0.tar: none has 'capton', which --captions names; what may be one: --captions caption or .txt" in words
    assert "have .jpg, .txt, .json, caption, url; captions come from .txt" in words
    assert "WARNING: images, of 12 samples: none has 'capton'" in (root / "report.txt").read_text()
    assert report(root)["captions"] == {".txt": 12} and report(root)["fields"] == {"caption": 12, "url": 12}
    root = tmp_path / "both"
    assert encode(root, "--input", str(tmp_path / "t"), "--captions", "caption=0.5,.txt=0.5") == 0
    counted = report(root)["captions"]
    assert set(counted) == {"caption", ".txt"} and sum(counted.values()) == 12
    assert f"captions come from {max(counted, key=lambda name: counted[name])}" in (root / "report.txt").read_text()
    assert "none has" not in said()


def test_an_empty_data_set_may_be_made_anew_and_another_not(tmp_path: Path, said: Callable[[], str]) -> None:
    write(tmp_path / "t" / "0.tar", samples(4, aesthetic=6))
    root, tars = tmp_path / "data", str(tmp_path / "t")
    assert encode(root, "--input", tars, "--filter", "asthetic >= 5") == 1
    assert "none has 'asthetic', which the filter reads; they have 'aesthetic'" in said()
    assert report(root)["dropped"] == {"no field asthetic": 4}
    assert encode(root, "--input", tars, "--filter", "aesthetic >= 5") == 0
    assert "holds no sample: it is made anew" in said() and len(rows(root)) == 4
    fresh = tmp_path / "fresh"
    assert encode(fresh, "--input", tars, "--filter", "aesthetic >= 5") == 0
    assert contents(root) == contents(fresh)
    said()
    assert encode(root, "--input", tars, "--filter", "aesthetic >= 7") == 1
    assert "was made with other settings; choose another --output" in said()


def test_changed_tars_are_named_all_at_once_and_made_again(tmp_path: Path, said: Callable[[], str]) -> None:
    tars = {name: write(tmp_path / "t" / f"{name}.tar", samples(3)) for name in "abc"}
    cut = tars["a"].read_bytes()
    tars["a"].write_bytes(cut[: int(len(cut) * 0.4)])
    root, given = tmp_path / "data", ["--input", str(tmp_path / "t")]
    assert encode(root, *given) == 0
    assert "WARNING: 1 tar not whole; fetch again, and run the command with --changed remake" in said()
    assert [p["part"] for p in report(root)["parts"] if p.get("incomplete")] == ["images/a"]
    tars["a"].write_bytes(cut)  # fetched whole
    before = tars["b"].stat()
    write(tars["b"], samples(3, "a blue square"))  # of the same size, at its place
    assert tars["b"].stat().st_size == before.st_size
    os.utime(tars["b"], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert encode(root, *given) == 1
    words = said()
    assert f"{tars['a']} has {len(cut)} bytes, images/a was made of" in words and f"{tars['b']} was changed" in words
    assert "images/c" not in words and "--changed remake" in words
    assert encode(root, *given, "--changed", "keep") == 0
    assert encode(root, *given, "--changed", "remake") == 0
    assert {row["caption"] for key, row in rows(root).items() if "/b/" in key} == {"a blue square"}
    assert len(rows(root)) == 9 and not any(p.get("incomplete") for p in report(root)["parts"])
    fresh = tmp_path / "fresh"
    assert encode(fresh, *given) == 0
    assert contents(root) == contents(fresh)
    said()
    assert verify.main([str(root)]) == 0
    assert encode(root, *given) == 0


def test_a_tar_that_changes_while_it_is_read_is_left_out_for_now(
    tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = write(tmp_path / "0.tar", samples(3))
    from data_prep.worker import worker

    read = worker.read_samples

    def growing(*arguments: object) -> object:
        for item in read(*arguments):  # type: ignore[arg-type]
            os.utime(tar, ns=(0, 1))
            yield item

    monkeypatch.setattr(worker, "read_samples", growing)
    assert encode(tmp_path / "data", "--input", str(tar)) == 1
    assert "was changed while it was read" in said() and not whole_parts(tmp_path / "data")
    monkeypatch.undo()
    assert encode(tmp_path / "data", "--input", str(tar)) == 0


@pytest.mark.parametrize(
    ("members", "there", "proposal"),
    [
        ([("0.jpg", PICTURES[0]), ("0.json", b'{"prompt": "a red circle", "n": 1}')], "'prompt', 'n'", "prompt"),
        ([("0.jpg", PICTURES[0]), ("0.json", b'{"caption": null, "alt": "a circle"}')], "'caption', 'alt'", "alt"),
        ([("0.jpg", PICTURES[0]), ("0.caption", b"a red circle")], ".jpg, .caption", ".caption"),
        ([("0.jpg", PICTURES[0]), ("0.json", b'{"sub": ["a red circle", "a b"]}')], "'sub'", "sub"),
    ],
)
def test_captions_under_another_name(
    tmp_path: Path, said: Callable[[], str], members: Members, there: str, proposal: str
) -> None:
    write(tmp_path / "0.tar", members)
    root, given = tmp_path / "data", ["--input", str(tmp_path / "0.tar")]
    assert encode(root, *given) == 1
    words = said()
    assert f"none has a picture with its caption; what may be one: --captions {proposal}" in words
    assert "--sort=name" not in words
    (reject,) = map(json.loads, (root / "reports/images/0.jsonl").read_text().splitlines())
    assert there in reject["detail"] and f"texts: --captions {proposal}" in reject["detail"]
    assert encode(root, *given, "--captions", proposal) == 0
    assert len(rows(root)) == 1


def test_tokens_that_the_text_encoder_does_not_know(tmp_path: Path, said: Callable[[], str]) -> None:
    tar = write(tmp_path / "0.tar", [*samples(1), ("zh.jpg", PICTURES[0]), ("zh.txt", "红色的圆".encode())])
    root = tmp_path / "data"
    assert encode(root, "--input", str(tar)) == 0
    # "a red circle" has 3 tokens, the other one 2 of which 1 is unknown.
    assert report(root)["unknown"] == {"tokens": 1, "captions": 1}
    assert "20.00% of the tokens are unknown to tiny, in 50.00% of the captions" in said()
    assert encode(tmp_path / "kept", "--input", str(tar), "--max-unknown", "0.5") == 0
    assert len(rows(tmp_path / "kept")) == 2
    assert encode(tmp_path / "dropped", "--input", str(tar), "--max-unknown", "0.4") == 0
    assert report(tmp_path / "dropped")["dropped"] == {"unknown_tokens": 1} and keys(tmp_path / "dropped") == {"0/000"}
    said()
    assert encode(root, "--input", str(tar), "--max-unknown", "0.4") == 1
    assert "max_unknown: there None, now 0.4" in said()


def test_several_inputs_of_every_kind(tmp_path: Path, said: Callable[[], str]) -> None:
    plain = write(tmp_path / "dir[1]" / "a.tar", samples(2))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    pictures = [{"bytes": picture, "path": "x.jpg"} for picture in PICTURES]
    table = pyarrow.table({"image": pictures, "caption": ["a red circle"] * 4})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    for name, data in samples(3):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_bytes(data)
    root = tmp_path / "data"
    inputs = ["dir[1]", "b.tar.gz", "c.parquet", "d"]
    assert encode(root, "--input", *(str(tmp_path / name) for name in inputs)) == 0
    assert "4 inputs, 0 of them already encoded" in said()
    assert keys(root) == {
        *(f"{part}/{n:03d}" for part in "ab" for n in range(2)),
        *(f"c/{n:08d}" for n in range(4)),
        *(f"d-00000/{n:03d}" for n in range(3)),
    }
    assert verify.main([str(root)]) == 0
    (command,) = (root / "work" / "encode").glob("*.json")
    arguments = json.loads(command.read_text())["arguments"]
    assert arguments[:4] == [f"--input={tmp_path / name}" for name in inputs]


def test_folders_without_any_say_what_they_hold(tmp_path: Path, said: Callable[[], str]) -> None:
    write(tmp_path / "deep" / "a" / "0.tar", samples(1))
    (tmp_path / "empty").mkdir()
    for name, words in (("deep", "it has 1 folder; those in its folders are found by"), ("empty", "it is empty")):
        assert encode(tmp_path / "data", "--input", str(tmp_path / name)) == 1
        assert f"{name} exists, but holds no *.tar, no *.parquet and no pictures: {words}" in said()


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_parquet_files_and_folders_are_as_exact_as_tars(
    tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Filters, rejects, duplicates and reports as of tars; the same bytes after a stop; another worker's part is left to it."""
    monkeypatch.setattr(folders, "CHUNK", 4)
    given = tmp_path / "in"
    given.mkdir()
    about = [{"caption": f"a red circle {n}", "aesthetic": n} for n in range(8)]
    pictures = [jpeg(64, 64, n) for n in range(6)] + [b"no picture", jpeg(64, 64, 1)]
    if kind == "parquet":
        for part in (0, 1):
            some = slice(4 * part, 4 * part + 4)
            columns = {"image": [{"bytes": p, "path": ""} for p in pictures[some]]}
            columns |= {name: [row[name] for row in about[some]] for name in ("caption", "aesthetic")}  # type: ignore[misc]
            pyarrow.parquet.write_table(pyarrow.table(columns), given / f"{part}.parquet")
        parts = ["images/0", "images/1"]
    else:
        for n in range(8):
            (given / f"{n}.jpg").write_bytes(pictures[n])
            (given / f"{n}.json").write_text(json.dumps(about[n]))
        parts = ["images/in-00000", "images/in-00001"]
    options = ["--input", str(given), "--filter", "aesthetic >= 1", "--duplicates", "exact"]
    root = tmp_path / "data"
    assert encode(root, *options) == 0
    assert whole_parts(root) == parts
    found = report(root)
    assert found["dropped"] == {"duplicate": 1, "filtered by aesthetic >= 1": 1, "unsupported_format": 1}
    assert found["read"] == 8 and found["captions"] == {"caption": 5}
    before = contents(root)
    (root / schema.REPORTS / f"{parts[1]}.json").unlink()  # as if killed
    said()
    with Claims(root / schema.WORK / "claims", timeout=1.0) as other:
        assert other.claim(parts[1])
        assert encode(root, *options) == 0
        assert "others are at work on 1 part" in said() and whole_parts(root) == parts[:1]
    assert encode(root, *options) == 0
    assert "2 inputs, 1 of them already encoded" in said()
    assert contents(root) == before
    assert verify.main([str(root)]) == 0


def test_buckets_of_the_tiny_encoders_say_what_can_train_on_them(
    tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "warn", print)  # among what is printed, so that the order shows
    write(tmp_path / "0.tar", samples(1))
    encode(tmp_path / "data", "--input", str(tmp_path), "--buckets", "--resolutions", "256")
    words = said()
    assert words.index("train with model.patch=2, or encode without --buckets") < words.index("read 1")
