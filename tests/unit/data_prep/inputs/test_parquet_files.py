"""Parquet files, written by pyarrow as Hugging Face's data sets and img2dataset write them, and damaged ones."""

from __future__ import annotations

import datetime
import decimal
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.inputs.captions import CaptionChoice
from data_prep.inputs.contents import Contents
from data_prep.inputs.parquet_files import is_list, read_parquet
from data_prep.inputs.samples import Reject, Sample

TEXT = CaptionChoice.parse("text")
STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def outcomes(items: Any) -> list[str]:
    return [item.key if isinstance(item, Sample) else f"{item.key}: {item.reason}" for item in items]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train-00000-of-00001.parquet"


def test_a_data_set_of_hugging_face(path: Path) -> None:
    pictures = [{"bytes": bytes([n]) * 9, "path": f"{n}.jpg"} for n in range(100)]
    columns = {"image": pyarrow.array(pictures, STRUCT), "text": [f"a dog {n}" for n in range(100)], "n": range(100)}
    contents = Contents()
    found = list(read_parquet(write(path, columns, row_group_size=30), TEXT, contents))
    expected = [Sample(f"{n:08d}", bytes([n]) * 9, f"a dog {n}", {"text": f"a dog {n}", "n": n}) for n in range(100)]
    assert found == expected
    assert contents.samples == 100 and contents.texts == {"text": 100} and not contents.incomplete


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()])
@pytest.mark.parametrize("name", ["image", "jpg", "anything"])
def test_bytes_alone_are_a_picture(path: Path, name: str, kind: pyarrow.DataType) -> None:
    columns = {name: pyarrow.array([b"i"], kind), "caption": ["a dog"], "key": ["000000007"]}
    fields = {"caption": "a dog", "key": "000000007"}
    assert list(read_parquet(write(path, columns), CaptionChoice())) == [Sample("000000007", b"i", "a dog", fields)]


def test_every_row_is_a_sample_or_a_reject(path: Path) -> None:
    pictures = [b"i", None, b"", b"i", b"i", b"i", b"x" * 101]
    captions = ["a", "b", "c", None, "  ", "f", "g"]
    columns = {"image": pictures, "caption": captions, "key": ["0", "1", "2", "3", "4", "0", None]}
    assert outcomes(read_parquet(write(path, columns), CaptionChoice(), max_image_bytes=100)) == [
        "0",
        "1: no_image",
        "2: no_image",
        "3: no_caption",
        "4: empty_caption",
        "0: duplicate_key",
        "00000006: oversized_member",
    ]


def test_a_path_is_never_opened(path: Path) -> None:
    columns = {"image": pyarrow.array([{"bytes": None, "path": str(path)}], STRUCT), "caption": ["a"]}
    (item,) = read_parquet(write(path, columns), CaptionChoice())
    assert isinstance(item, Reject) and item.reason == "no_image" and "only bytes in the file are taken" in item.detail


def test_fields_of_every_type(path: Path) -> None:
    moment = datetime.datetime(2024, 1, 2)
    columns = {
        "image": [b"i"],
        "tags": [["a red dog", "b"]],
        "kind": pyarrow.array(["cat"]).dictionary_encode(),
        "score": pyarrow.array([decimal.Decimal("5.5")]),
        "flag": [True],
        "none": pyarrow.nulls(1),
        "when": [moment],
        "embedding": [[0.5] * 8],  # neither a caption nor for a filter
        "thumbnail": pyarrow.array([{"w": 1}]),
    }
    (sample,) = read_parquet(write(path, columns), CaptionChoice.parse("tags"))
    assert isinstance(sample, Sample) and sample.caption in ("a red dog", "b")
    fields = {"tags": ["a red dog", "b"], "kind": "cat", "score": 5.5, "flag": True, "none": None, "when": str(moment)}
    fields["thumbnail.w"] = 1
    assert sample.metadata == fields


def test_texts_that_are_not_utf8(path: Path) -> None:
    texts = pyarrow.array([b"a dog", b"caf\xe9"]).cast(pyarrow.binary()).view(pyarrow.string())
    write(path, {"image": [b"i", b"i"], "caption": texts, "other": ["b", "b"]})
    assert outcomes(read_parquet(path, CaptionChoice())) == ["00000000", "00000001: caption_not_utf8"]
    assert outcomes(read_parquet(path, CaptionChoice.parse("other"))) == ["00000000", "00000001"]


def test_a_text_without_a_caption_names_the_columns(path: Path) -> None:
    (item,) = read_parquet(write(path, {"image": [b"i"], "prompt": ["a red dog"]}), CaptionChoice())
    assert isinstance(item, Reject) and "there is 'prompt'; texts: --captions prompt" in item.detail


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"url": ["https://x"], "caption": ["a"]}, "no column of pictures.*url: string"),
        ({"before": [b"i"], "after": [b"i"]}, "pictures may be in before or after: call one of them image"),
    ],
)
def test_no_column_of_pictures(path: Path, columns: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_parquet(write(path, columns), CaptionChoice())


def test_the_column_image_comes_before_others_of_bytes(path: Path) -> None:
    (sample,) = read_parquet(write(path, {"mask": [b"m"], "image": [b"i"], "caption": ["a"]}), CaptionChoice())
    assert isinstance(sample, Sample) and sample.image == b"i" and "mask" not in sample.metadata


@pytest.mark.parametrize("data", [b"", b"PAR1", b"<html>" * 100])
def test_no_parquet_file(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is no whole Parquet file \(.*; fetch or write it again") as error:
        read_parquet(path, CaptionChoice())
    assert "\n" not in str(error.value)


def test_a_cut_file_a_folder_and_none(path: Path, tmp_path: Path) -> None:
    write(path, {"image": [b"i" * 1000] * 50, "caption": ["a"] * 50})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is no whole Parquet file"):
        read_parquet(path, CaptionChoice())
    with pytest.raises(ValueError, match="is no regular file"):
        read_parquet(tmp_path, CaptionChoice())
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_parquet(tmp_path / "absent.parquet", CaptionChoice())


def test_no_rows(path: Path) -> None:
    contents = Contents()
    columns = {"image": pyarrow.array([], pyarrow.binary()), "caption": pyarrow.array([], pyarrow.string())}
    assert list(read_parquet(write(path, columns), CaptionChoice(), contents)) == []
    assert contents.incomplete == "it holds no row"


def test_a_damaged_row_group_costs_its_own_rows_alone(path: Path) -> None:
    rng = random.Random(0)
    pictures = [rng.randbytes(2000) for _ in range(300)]
    write(
        path,
        {"image": pictures, "caption": ["a"] * 300},
        row_group_size=100,
        write_page_checksum=True,
        use_dictionary=False,
    )
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[group.data_page_offset + group.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    contents = Contents()
    items = list(read_parquet(path, CaptionChoice(), contents))
    keys = [f"{n:08d}" for n in range(300)]
    assert [item.key for item in items] == keys
    dropped = [item.key for item in items if isinstance(item, Reject)]
    assert dropped and set(dropped) <= set(keys[100:200])
    assert all(item.reason == "damaged_rows" for item in items if isinstance(item, Reject))
    assert all(item.image == pictures[int(item.key)] for item in items if isinstance(item, Sample))
    assert contents.incomplete.startswith("row group 1 is damaged")


@pytest.mark.parametrize("seed", range(40))
def test_fuzz(path: Path, seed: int) -> None:
    """Whatever is flipped: as many items as rows, or one clear error, and nothing else is raised."""
    rng = random.Random(seed)
    write(path, {"image": [rng.randbytes(300) for _ in range(60)], "caption": ["a dog"] * 60}, row_group_size=20)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 3, 20))):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    path.write_bytes(data)
    try:
        items = read_parquet(path, CaptionChoice())
    except ValueError:
        return
    found = list(items)
    assert len({item.key for item in found}) == len(found) == pyarrow.parquet.read_metadata(path).num_rows


def test_fields_of_objects(path: Path) -> None:
    texts = [{"short": "a", "long": "a dog", "raw": b"b"}, {"short": "b", "long": None, "raw": b"b"}, None]
    columns = {"image": [{"bytes": b"i", "path": ""}] * 3, "text": texts}
    found = list(read_parquet(write(path, columns), CaptionChoice.parse("text.long")))
    assert found[0] == Sample("00000000", b"i", "a dog", {"text.short": "a", "text.long": "a dog"})
    assert outcomes(found[1:]) == ["00000001: no_caption", "00000002: no_caption"]


def test_row_groups_without_rows(path: Path) -> None:
    table = pyarrow.table({"image": [b"i"], "caption": ["a dog"]})
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
        for part in (table.slice(0, 0), table, table.slice(0, 0), table):
            writer.write_table(part)
    assert outcomes(read_parquet(path, CaptionChoice())) == ["00000000", "00000001"]


def test_a_file_behind_a_link_as_in_the_hubs_cache(path: Path, tmp_path: Path) -> None:
    path.symlink_to(write(tmp_path / "3f2a", {"image": [b"i"], "caption": ["a dog"]}))
    assert outcomes(read_parquet(path, CaptionChoice())) == ["00000000"]


def test_a_list_of_urls_says_what_to_do(path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no column of pictures; of a list of URLs, fetch them by img2dataset first;.*URL"
    ):
        read_parquet(write(path, {"URL": ["https://x"], "TEXT": ["a dog"]}), CaptionChoice())
    assert is_list(path)
    path.write_bytes(path.read_bytes()[:-20] + b"\xff" * 12 + path.read_bytes()[-8:])
    assert not is_list(path)  # what is damaged is no list of URLs
