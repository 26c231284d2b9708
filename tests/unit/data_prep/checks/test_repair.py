"""Repair with a stand-in for the encode command: what is removed, and what is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.checks.damage import Damage, Files
from data_prep.checks.repair import EncodeCommand, repair
from data_prep.inputs.captions import CaptionChoice
from data_prep.inputs.filters import Filter
from data_prep.inputs.sources import Job, Source
from data_prep.schema import write_file
from data_prep.worker.commands import save_command
from data_prep.worker.parts import whole_parts

DAMAGE = Damage("reports/a/0.jsonl", "is missing", "a/0")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two parts, of a tar with 7 bytes each, and the commands that made them."""
    monkeypatch.chdir(tmp_path)
    for part in ("0", "1"):
        write_file(tmp_path / "data", f"reports/a/{part}.json", '{"tar_bytes": 7}')
        save_command(tmp_path / "data", [f"--input={part}.tar"], "data")
    return tmp_path / "data"


def encode_command(ran: list[list[str]], size: int = 7, code: int = 0) -> EncodeCommand:
    source = Source("a", (), CaptionChoice(), Filter())

    def jobs(arguments: list[str]) -> list[Job]:
        part = arguments[0].removeprefix("--input=").removesuffix(".tar")
        return [Job(source, part, f"{part}.tar", size)]

    def main(arguments: list[str]) -> int:
        ran.append(arguments)
        return code

    return EncodeCommand(main, jobs)


def test_the_damaged_part_alone_is_made_again(root: Path) -> None:
    ran: list[list[str]] = []
    repair(Files(str(root), root), root, [DAMAGE], ["--device=cpu"], encode_command(ran))
    assert ran == [["--input=0.tar", f"--output={root}", "--device=cpu"]]
    assert whole_parts(root) == ["a/1"]


def test_a_card_is_written_by_all_commands(root: Path) -> None:
    ran: list[list[str]] = []
    repair(Files(str(root), root), root, [Damage("dataset.json", "is missing")], [], encode_command(ran))
    assert sorted(arguments[0] for arguments in ran) == ["--input=0.tar", "--input=1.tar"]
    assert whole_parts(root) == ["a/0", "a/1"]


def test_a_replaced_tar_removes_nothing(root: Path) -> None:
    ran: list[list[str]] = []
    with pytest.raises(ValueError, match=r"nothing was removed.*: 0\.tar has 8 bytes, a/0 was made of 7"):
        repair(Files(str(root), root), root, [DAMAGE], [], encode_command(ran, size=8))
    with pytest.raises(ValueError, match="no tar is found any more for a/5"):
        repair(Files(str(root), root), root, [Damage("x", "y", "a/5")], [], encode_command(ran))
    assert whole_parts(root) == ["a/0", "a/1"] and not ran


def test_an_encoding_that_fails_is_an_error(root: Path) -> None:
    with pytest.raises(ValueError, match=r"encode\.py did not come to its end"):
        repair(Files(str(root), root), root, [DAMAGE], [], encode_command([], code=1))
