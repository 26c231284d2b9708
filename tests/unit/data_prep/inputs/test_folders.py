"""Plain folders of pictures: captions beside them, further fields in a list, and files that are not what they should be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.inputs.captions import CaptionChoice
from data_prep.inputs.contents import Contents
from data_prep.inputs.finder import find_inputs
from data_prep.inputs.folders import read_folder
from data_prep.inputs.samples import Reject, Sample


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def read(folder: Path, captions: str | None = None, contents: Contents | None = None) -> list[Sample | Reject]:
    choice = CaptionChoice.parse(captions)
    return [s for found in find_inputs(str(folder)) for s in read_folder(folder, found.files, choice, contents)]


def outcomes(items: list[Sample | Reject]) -> list[str]:
    return [item.key if isinstance(item, Sample) else f"{item.key}: {item.reason}" for item in items]


def test_pictures_with_texts_beside_them(tmp_path: Path) -> None:
    about = json.dumps({"caption": "from json", "aesthetic": 6})
    write(
        tmp_path,
        {"a.jpg": b"i", "a.txt": "\ufeffa dog \r\n", "sub/b.v2.PNG": b"j", "sub/b.v2.json": about, "README.md": "x"},
    )
    contents = Contents()
    assert read(tmp_path, contents=contents) == [
        Sample("a", b"i", "a dog", {}),
        Sample("sub/b.v2", b"j", "from json", {"caption": "from json", "aesthetic": 6}),
    ]
    assert contents.members == {".jpg": 1, ".txt": 1, ".png": 1, ".json": 1}
    write(tmp_path, {"a.caption": "kohya's"})
    assert read(tmp_path, ".caption")[0] == Sample("a", b"i", "kohya's", {})


def test_every_sample_is_counted_once(tmp_path: Path) -> None:
    files = {"a.jpg": b"i", "b.txt": "no picture", "c.jpg": b"i", "c.txt": "\n", "d.gif": b"i", "d.txt": "d"}
    files |= {"e.jpg": b"i", "e.png": b"i", "e.txt": "e", "f.jpg": b"i", "f.txt": b"\xff", "g.jpg": b"i", "g.json": "["}
    assert outcomes(read(write(tmp_path, files))) == [
        "a: no_caption",
        "b: no_image",
        "c: empty_caption",
        "d: no_image",
        "e: duplicate_member",
        "f: caption_not_utf8",
        "g: bad_json",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg", "text": "a \u2028dog", "n": 1}\n\n{"file_name": "s/b.jpg", "text": "b"}\n',
        ),
        ("metadata.csv", 'file_name,text,n\na.jpg,"a \u2028dog",1\ns/b.jpg,b,2\n'),
    ],
)
def test_the_lists_of_hugging_face(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path, {"a.jpg": b"i", "c.jpg": b"i", name: "\ufeff" + content})
    (a, c) = read(tmp_path, "text")
    assert isinstance(a, Sample) and a.caption == "a \u2028dog" and float(a.metadata["n"]) == 1
    assert isinstance(c, Reject) and c.reason == "no_caption"


def test_a_list_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"i", "metadata.jsonl": '{"file": "a.jpg"}'})
    with pytest.raises(ValueError, match=r"metadata\.jsonl: row 1 has no file_name .* it has 'file'"):
        find_inputs(str(tmp_path))
    write(tmp_path, {"metadata.jsonl": "{"})
    with pytest.raises(
        ValueError, match=r"metadata\.jsonl cannot be read \(JSONDecodeError: .*; mend it, or remove it"
    ):
        find_inputs(str(tmp_path))


def test_a_list_that_changes_changes_the_pictures(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"i", "metadata.jsonl": '{"file_name": "a.jpg", "text": "old"}'})
    (before,) = find_inputs(str(tmp_path))
    write(tmp_path, {"metadata.jsonl": '{"file_name": "a.jpg", "text": "newer"}'})
    (after,) = find_inputs(str(tmp_path))
    assert before.changed != after.changed
    assert [item.caption for item in read(tmp_path, "text") if isinstance(item, Sample)] == ["newer"]


def test_pipes_and_links(tmp_path: Path) -> None:
    write(tmp_path, {"out/x": b"i", "in/b.jpg": b"i", "in/b.txt": "b", "in/a.txt": "a"})
    os.mkfifo(tmp_path / "in" / "c.jpg")
    (tmp_path / "in" / "a.jpg").symlink_to(tmp_path / "out" / "x")  # as the hub's cache has them
    assert outcomes(read(tmp_path / "in")) == ["a", "b", "c: unsafe_member"]


def test_a_file_that_is_gone_is_an_error_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"i", "a.txt": "a", "b.jpg": b"i", "b.txt": "b"})
    (found,) = find_inputs(str(tmp_path))
    samples = read_folder(tmp_path, found.files, CaptionChoice())
    assert next(samples).key == "a"
    (tmp_path / "b.txt").unlink()
    with pytest.raises(FileNotFoundError):
        list(samples)


@pytest.mark.parametrize("suffix", [".jpg", ".JPG"])
def test_texts_that_are_called_by_the_whole_name_of_their_picture(tmp_path: Path, suffix: str) -> None:
    """As gallery-dl writes them: cat.jpg.json; and upper case."""
    write(
        tmp_path, {f"a{suffix}": b"i", f"a{suffix}.json": '{"caption": "a dog"}', "b.v1.PNG": b"j", "b.v1.PNG.TXT": "x"}
    )
    assert read(tmp_path) == [Sample("a", b"i", "a dog", {"caption": "a dog"}), Sample("b.v1", b"j", "x", {})]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet"])
def test_a_list_above_the_folders_of_its_pictures(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"train/a.jpg": b"i", "train/b.jpg": b"j"})
    if name.endswith(".parquet"):
        table = pyarrow.table({"file_name": ["train/a.jpg", "train\\b.jpg"], "text": ["a dog", "a cat"]})
        pyarrow.parquet.write_table(table, tmp_path / name)
    elif name.endswith(".jsonl"):
        rows = [{"file_name": "train/a.jpg", "text": "a dog"}, {"file_name": "train\\b.jpg", "text": "a cat"}]
        write(tmp_path, {name: "\n".join(map(json.dumps, rows))})
    else:
        comma = "\t" if name.endswith(".tsv") else ","
        rows = [("file_name", "text"), ("train/a.jpg", "a dog"), ("train\\b.jpg", "a cat")]
        write(tmp_path, {name: "\r\n".join(map(comma.join, rows))})
    assert read(tmp_path, "text") == [
        Sample("train/a", b"i", "a dog", {"text": "a dog"}),
        Sample("train/b", b"j", "a cat", {"text": "a cat"}),
    ]


@pytest.mark.parametrize(
    ("content", "there"),
    [
        ("image,caption\na.jpg,a dog\n", "it has 'image', 'caption'"),
        ("file_name;caption\na.jpg;a\n", "it has 'file_name;c"),
    ],
)
def test_a_list_without_file_names_says_what_it_has(tmp_path: Path, content: str, there: str) -> None:
    write(tmp_path, {"a.jpg": b"i", "metadata.csv": content})
    with pytest.raises(ValueError, match=f"metadata.csv: row 1 has no file_name that names a picture: {there}"):
        read(tmp_path)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"i", "a.txt": "a dog"})
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(FileNotFoundError, match=r"b\.jpg is a link to .*gone\.jpg, which is not there; mend or remove"):
        read(tmp_path)


def test_fields_within_fields(tmp_path: Path) -> None:
    about = {"captions": {"short": "a dog", "long": "a dog on a mat"}, "captions.short": "stands in the json itself"}
    write(tmp_path, {"a.jpg": b"i", "a.json": json.dumps(about)})
    (sample,) = read(tmp_path, "captions.long")
    assert isinstance(sample, Sample) and sample.caption == "a dog on a mat"
    assert sample.metadata == {**about, "captions.long": "a dog on a mat"}
