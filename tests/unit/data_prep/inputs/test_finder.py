"""What `--input` names: files, folders of every kind, patterns, and paths with letters that patterns use."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.inputs import folders
from data_prep.inputs.finder import Found, counted_inputs, find_inputs, is_parquet, last_change


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 3)


def names(pattern: str | Path) -> list[str]:
    return [Path(found.url).name if not found.files else found.part for found in find_inputs(str(pattern))]


def test_a_folder_a_pattern_and_a_list(tmp_path: Path) -> None:
    for name, size in (("b.tar", 3), ("a.tar", 2), ("c.txt", 1)):
        (tmp_path / name).write_bytes(bytes(size))
    both = [(f"{tmp_path}/a.tar", 2), (f"{tmp_path}/b.tar", 3)]
    for pattern in (tmp_path, tmp_path / "*.tar", tmp_path / "{b,a}.tar", f"{tmp_path}/b.tar::{tmp_path}/a.tar"):
        assert [(found.url, found.bytes) for found in find_inputs(str(pattern))] == both
    with pytest.raises(FileNotFoundError, match=r"z\.tar: no such file; it has 2 \.tar, 1 \.txt"):
        find_inputs(f"{tmp_path}/{{a,z}}.tar")
    with pytest.raises(FileNotFoundError, match=r"none/deep/x\.tar: no such file"):
        find_inputs(f"{tmp_path}/none/deep/x.tar")


@pytest.mark.parametrize("folder", ["dir[1]", "dir{1,2}", "a*b", "c?", "[!x]", "x{", "${X}", "a::b"])
def test_what_exists_is_literal(tmp_path: Path, folder: str) -> None:
    touch(tmp_path / folder / "0.tar", tmp_path / folder / "1.tar", tmp_path / "dir1" / "9.tar")
    assert names(tmp_path / folder) == ["0.tar", "1.tar"]
    assert names(tmp_path / folder / "1.tar") == ["1.tar"]
    if "::" not in folder:
        assert names(tmp_path / folder / "*.tar") == names(tmp_path / folder / "{0,1}.tar") == ["0.tar", "1.tar"]
    touch(tmp_path / "[0].tar")
    assert names(tmp_path / "[0].tar") == ["[0].tar"]


def test_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(Path("0.tar"), Path("t/1.tar"))
    assert [found.url for found in find_inputs("*.tar")] == ["0.tar"]
    assert [found.url for found in find_inputs("t")] == [found.url for found in find_inputs("./t/*.tar")] == ["t/1.tar"]
    assert [found.url for found in find_inputs("**/*.tar")] == ["0.tar", "t/1.tar"]


def test_packed_tars_and_their_parts(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.tar", "b.tar.gz", "c.tgz", "D.TAR", "e.v1.tar.xz", "._a.tar", "f.zip")))
    parts = {Path(found.url).name: found.part for found in find_inputs(str(tmp_path))}
    assert parts == {"D.TAR": "D", "a.tar": "a", "b.tar.gz": "b", "c.tgz": "c", "e.v1.tar.xz": "e.v1"}


def test_tars_come_before_the_parquet_files_of_img2dataset_and_those_before_pictures(tmp_path: Path) -> None:
    touch(tmp_path / "00000.tar", tmp_path / "00000.parquet", tmp_path / "00000_stats.json", tmp_path / "a.jpg")
    assert names(tmp_path) == ["00000.tar"]
    (tmp_path / "00000.tar").unlink()
    assert names(tmp_path) == names(tmp_path / "*.parquet") == ["00000.parquet"]
    assert is_parquet("x.PARQUET") and not is_parquet("x.tar")
    (tmp_path / "00000.parquet").unlink()
    assert names(tmp_path) == [f"{tmp_path.name}-00000"]


def test_a_folder_without_any_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"exists, but holds no \*\.tar, .* and no pictures: it is empty"):
        find_inputs(str(tmp_path))
    touch(tmp_path / "a" / "0.tar", tmp_path / "b" / "0.tar.gz", tmp_path / "LICENSE")
    with pytest.raises(
        FileNotFoundError, match=r"it has 2 folders, 1 file; those in its folders are found by '.*/\*\*/\*\."
    ):
        find_inputs(str(tmp_path))
    touch(tmp_path / "c" / "preview.jpg")  # no folder of pictures is made of that
    with pytest.raises(FileNotFoundError, match="it has 3 folders"):
        find_inputs(str(tmp_path))
    touch(tmp_path / "d" / "a.txt", tmp_path / "d" / "b.tar.zst")
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.tar.* it has 1 \.tar\.zst, 1 \.txt"):
        find_inputs(str(tmp_path / "d"))


def test_a_pattern_of_folders_gives_what_each_holds(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "0.tar", tmp_path / "b" / "1.parquet", tmp_path / "c" / "x.jpg")
    assert names(tmp_path / "*") == ["0.tar", "1.parquet", "c-00000"]


@pytest.mark.parametrize("pattern", ["pipe:cat x", "ftp://h/x.tar", "file:///x.tar"])
def test_nothing_else_is_opened(pattern: str) -> None:
    with pytest.raises(ValueError, match="commands are never run"):
        find_inputs(pattern)


def test_a_pattern_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing environment variable.*WDS_NAME"):
        find_inputs(f"{tmp_path}/${{NOWHERE}}.tar")
    with pytest.raises(ValueError, match=r"Unbalanced.*must exist as it is written"):
        find_inputs(f"{tmp_path}/x{{.tar")


def test_the_last_change(tmp_path: Path) -> None:
    tar = tmp_path / "0.tar"
    touch(tar)
    os.utime(tar, ns=(0, 1_700_000_000_000_000_007))
    assert find_inputs(str(tar)) == [Found("0", str(tar), 3, "2023-11-14T22:13:20.000000007Z")]
    assert last_change(str(tar)) == (3, "2023-11-14T22:13:20.000000007Z")
    tar.write_bytes(b"four")
    assert last_change(str(tar))[0] == 4


def test_pictures_are_listed_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "CHUNK", 2)
    touch(
        *(tmp_path / name for name in ("b/1.jpg", "b/1.txt", "a.v1.JPG", "a.v1.json", "c.gif", "README.md", ".x.jpg"))
    )
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    found = find_inputs(str(tmp_path))
    assert [(f.part, f.files, f.bytes) for f in found] == [
        (f"{tmp_path.name}-00000", ("a.v1.JPG", "a.v1.json", "b/1.jpg", "b/1.txt"), 12),
        (f"{tmp_path.name}-00001", ("c.gif",), 3),
    ]
    before = found[0].changed
    assert last_change(str(tmp_path), found[0].files) == (12, before)
    (tmp_path / "b" / "1.txt").write_bytes(b"new")
    os.utime(tmp_path / "b" / "1.txt", ns=(0, 5))
    assert last_change(str(tmp_path), found[0].files)[1] != before


def test_what_inputs_are_called() -> None:
    assert counted_inputs(["a.tar", "b.tgz"]) == "2 tars"
    assert counted_inputs(["a.tar", "b.parquet"]) == counted_inputs(["a.tar", "/data/pictures"]) == "2 inputs"


def test_pictures_in_folders_beside_img2datasets_lists(tmp_path: Path) -> None:
    """As `--output_format files` writes them: 00000.parquet lists what lies in 00000/."""
    touch(tmp_path / "00000" / "1.jpg", tmp_path / "00000" / "1.txt", tmp_path / "00000_stats.json")
    pyarrow.parquet.write_table(pyarrow.table({"url": ["https://x"], "caption": ["a dog"]}), tmp_path / "00000.parquet")
    (found,) = find_inputs(str(tmp_path))
    assert found.files == ("00000/1.jpg", "00000/1.txt", "00000_stats.json")


def test_one_picture_is_no_input(tmp_path: Path) -> None:
    touch(tmp_path / "a.JPG")
    for pattern in ("a.JPG", "*.JPG"):
        with pytest.raises(ValueError, match="is one picture; give the folder that it is in"):
            find_inputs(str(tmp_path / pattern))
