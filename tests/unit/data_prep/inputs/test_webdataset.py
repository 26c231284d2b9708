"""webdataset's pieces: those that data prep stands on, and for each of the others a tar that shows why its own code stays."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from webdataset.shardlists import expand_urls, split_by_node
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander, tarfile_samples

from data_prep.inputs import finder, tars
from data_prep.inputs.samples import Sample
from data_prep.inputs.tars import read_tar

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)


def member(name: str, data: bytes, **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % BLOCK)


def whole(key: str) -> bytes:
    return member(f"{key}.jpg", b"i") + member(f"{key}.json", b"{}") + member(f"{key}.txt", b"a dog")


def theirs(tmp_path: Path, data: bytes) -> list[list[str]]:
    """webdataset's samples, each as its key and its members."""
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    return [[s["__key__"], *(k for k in s if not k.startswith("__"))] for s in tarfile_samples([{"url": str(path)}])]


def ours(tmp_path: Path, data: bytes) -> list[str]:
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    return [item.key if isinstance(item, Sample) else f"{item.key}: {item.reason}" for item in read_tar(path)]


WHOLE = ["jpg", "json", "txt"]


def test_its_key_rule_and_its_urls_are_used() -> None:
    assert tars.base_plus_ext is base_plus_ext and finder.expand_urls is expand_urls


def test_a_whole_tar_is_the_same_to_both(tmp_path: Path) -> None:
    data = whole("0") + whole("a/b.c/1") + END
    assert [sample[0] for sample in theirs(tmp_path, data)] == ours(tmp_path, data) == ["0", "a/b.c/1"]


def test_a_cut_tar_gives_a_sample_without_its_text(tmp_path: Path) -> None:
    data = (whole("0") + whole("1"))[: -2 * BLOCK]  # its text, whatever follows
    assert theirs(tmp_path, data) == [["0", *WHOLE], ["1", "jpg", "json"]]
    assert ours(tmp_path, data) == ["0", "1: truncated_tar"]


def test_a_bad_header_ends_a_tar_without_a_word(tmp_path: Path) -> None:
    data = bytearray(whole("0") + whole("1") + whole("2") + END)
    data[len(whole("0")) + 2 * BLOCK] ^= 1  # of the json of 1
    assert theirs(tmp_path, bytes(data)) == [["0", *WHOLE], ["1", "jpg"]]
    assert ours(tmp_path, bytes(data)) == ["0", "1: truncated_tar"]


def test_of_joined_tars_the_first_one_is_read(tmp_path: Path) -> None:
    data = whole("0") + END + whole("1") + END
    assert theirs(tmp_path, data) == [["0", *WHOLE]]
    assert ours(tmp_path, data) == ["0", "1"]


def test_members_that_lie_apart_are_two_samples(tmp_path: Path) -> None:
    data = member("0.jpg", b"i") + member("1.jpg", b"i") + member("0.txt", b"t") + member("1.txt", b"t") + END
    assert theirs(tmp_path, data) == [["0", "jpg"], ["1", "jpg"], ["0", "txt"], ["1", "txt"]]
    assert ours(tmp_path, data) == ["0: unsorted_tar"]


def test_a_second_picture_of_a_key_ends_the_tar(tmp_path: Path) -> None:
    data = member("0.jpg", b"i") + whole("0") + whole("1") + END
    with pytest.raises(ValueError, match="duplicate file name"):
        theirs(tmp_path, data)
    assert ours(tmp_path, data) == ["0: duplicate_member", "1"]


def test_its_grouping_loses_the_sample_in_hand_when_reading_fails() -> None:
    def files() -> Any:
        yield from ({"fname": f"{key}.jpg", "data": b"i", "__url__": ""} for key in "01")
        raise tars.TarError("the tar breaks here")

    groups = group_by_keys(files())
    assert next(groups)["__key__"] == "0"
    with pytest.raises(tars.TarError):  # and nothing says that it was in the sample 1
        next(groups)


def test_every_member_is_read_into_memory_and_links_are_passed_over(tmp_path: Path) -> None:
    data = member("0.jpg", b"i") + member("0.npy", b"x" * 10_000) + member("0.txt", b"", type=tarfile.SYMTYPE) + END
    assert theirs(tmp_path, data) == [["0", "jpg", "npy"]]
    (file, big, *_) = tar_file_expander([{"url": "", "stream": io.BytesIO(data)}])
    assert (file["fname"], len(big["data"])) == ("0.jpg", 10_000)
    assert ours(tmp_path, data) == ["0: unsafe_member"]


def test_its_splits_are_fixed_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead worker had is nobody's; claims hand it to another one."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert list(split_by_node(f"{n}.tar" for n in range(7))) == ["1.tar", "4.tar"]
