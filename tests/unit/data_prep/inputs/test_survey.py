"""The survey of a source's first samples, and what becomes of each kind of input that is read."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from encoding import write_pictures

from data_prep.inputs import survey as module
from data_prep.inputs.contents import Contents
from data_prep.inputs.reader import expected, read_samples
from data_prep.inputs.samples import Reject
from data_prep.inputs.sources import Source, make_source
from data_prep.inputs.survey import survey, survey_sources


def source(tmp_path: Path, captions: str | None = None, filter_: str = "") -> Source:
    return make_source("images", [str(tmp_path)], captions, filter_)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "0.tar", {str(n): (b"i", {"caption": "a dog", "LAION_aesthetic": n}) for n in range(150)})
    return tmp_path


def test_the_first_samples_are_looked_at(folder: Path) -> None:
    found = survey(source(folder), source(folder).jobs()[0])
    assert found.line.startswith(f"images: the first 100 samples of {folder}/0.tar have .jpg, .json, caption,")
    assert found.line.endswith("captions come from caption") and found.warnings == []


def test_names_that_no_sample_has(folder: Path) -> None:
    wrong = source(folder, "caption=0.5,recap=0.5", "asthetic > 5 and width > 5")
    captions, fields = survey(wrong, wrong.jobs()[0]).warnings
    assert "none has 'recap', which --captions names; what may be one: --captions caption" in captions
    assert "none has 'asthetic', which the filter reads; they have 'caption', 'LAION_aesthetic'" in fields


def test_an_input_that_cannot_be_read_is_left_to_the_encoding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise OSError("the line is down")

    monkeypatch.setattr(module, "read_samples", broken)
    lines: list[str] = []
    survey_sources([source(folder)], source(folder).jobs(), lines.append, lines.append)
    assert lines == []


def test_an_input_of_which_nothing_can_be_read_is_one_reject(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"<html>" * 100)
    contents = Contents()
    (item,) = read_samples(source(tmp_path).jobs()[0], contents)
    assert isinstance(item, Reject) and item.reason == "no_tar" and "is no tar file" in contents.incomplete
    (tmp_path / "0.tar").rename(tmp_path / "0.parquet")
    (item,) = read_samples(source(tmp_path).jobs()[0])
    assert isinstance(item, Reject) and item.reason == "no_parquet"


def test_an_input_that_changes_while_it_is_read(folder: Path) -> None:
    samples = read_samples(source(folder).jobs()[0])
    next(samples)
    write_pictures(folder / "0.tar", {"0": (b"another", {})})
    with pytest.raises(OSError, match=r"0\.tar was changed while it was read"):
        list(samples)


def test_counts_beside_tars_alone(tmp_path: Path) -> None:
    (tmp_path / "0_stats.json").write_text(json.dumps({"successes": 7}))
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"i"]}), tmp_path / "0.parquet")
    assert expected(source(tmp_path).jobs()[0]) is None
    (tmp_path / "0.parquet").unlink()
    write_pictures(tmp_path / "0.tar", {})
    assert expected(source(tmp_path).jobs()[0]) == 7


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("a.jpg", "captions.csv"), "captions.csv is not read: call it metadata.csv, with a column file_name"),
        (("images/a.jpg", "texts/a.txt"), "captions must lie beside their pictures, cat.txt and cat.jpg in one folder"),
    ],
)
def test_folders_whose_captions_lie_elsewhere(tmp_path: Path, files: tuple[str, ...], words: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a dog")
    one = source(tmp_path)
    (warning,) = survey(one, one.jobs()[0]).warnings
    assert warning.endswith(words) and "none has a picture with its caption" in warning and "--sort" not in warning
