"""Files of prompts as editors write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.sampling.prompts import read_prompts


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a dog\na cat\n", ["a dog", "a cat"]),
        (b"\xef\xbb\xbfa dog\r\na cat", ["a dog", "a cat"]),  # Windows' editors: a byte-order mark, and \r\n
        (b"\n  a dog \n\n", ["a dog"]),
        ("a\u2028dog\x0band\x0ca\x85cat\x1c!\n".encode(), ["a\u2028dog\x0band\x0ca\x85cat\x1c!"]),
        (b"a\rdog\n", ["a\rdog"]),
    ],
)
def test_a_newline_alone_ends_a_prompt(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    assert read_prompts(tmp_path / "p.txt") == expected


@pytest.mark.parametrize(
    ("content", "words"), [(b"\xef\xbb\xbf\n", "holds no prompts"), ("a".encode("utf-16"), "UTF-8")]
)
def test_files_that_are_none(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_prompts(tmp_path / "p.txt")
