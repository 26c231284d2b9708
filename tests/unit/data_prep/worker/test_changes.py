"""What changed since parts were made: named all at once, made again if that is asked for, by one of several workers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from encoding import CARD, write_part

from data_prep import schema
from data_prep.inputs.captions import CaptionChoice
from data_prep.inputs.filters import Filter
from data_prep.inputs.sources import Job, Source
from data_prep.worker.changes import changed_parts, is_empty, remove_changed, start_anew
from data_prep.worker.claims import Claims
from data_prep.worker.parts import whole_parts

SOURCE = Source("a", (), CaptionChoice(), Filter())
JOBS = [Job(SOURCE, str(n), f"{n}.tar", 10 + n, f"time {n}") for n in range(4)]


def made(root: Path, name: str, count: int, **report: object) -> None:
    write_part(root, name, count)
    path = root / schema.REPORTS / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | report))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set of four parts: as it was, of another size, of another time, and of 0.1.0."""
    CARD.save(tmp_path)
    made(tmp_path, "a/0", 1, tar="0.tar", tar_bytes=10, tar_changed="time 0")
    made(tmp_path, "a/1", 2, tar="1.tar", tar_bytes=99, tar_changed="time 1")
    made(tmp_path, "a/2", 3, tar="2.tar", tar_bytes=12, tar_changed="time x")
    made(tmp_path, "a/3", 4, tar="3.tar", tar_bytes=13)
    return tmp_path


@pytest.fixture
def claims(root: Path) -> Iterator[Claims]:
    with Claims(root / schema.WORK / "claims") as own:
        yield own


def test_all_are_named_by_size_and_time(root: Path) -> None:
    assert changed_parts(root, JOBS) == {
        "a/1": "1.tar has 11 bytes, a/1 was made of 99",
        "a/2": "2.tar was changed (time 2) since a/2 was made of it (time x)",
    }
    unknown = [Job(SOURCE, str(n), f"{n}.tar", size) for n, size in ((1, 99), (2, 12))]  # as web servers tell no time
    assert changed_parts(root, unknown) == {}


def test_they_alone_are_removed(root: Path, claims: Claims) -> None:
    hashes = [root / schema.WORK / "hashes" / "exact-64" / f"a/{n}.npz" for n in (0, 1)]
    for path in hashes:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    remove_changed(root, JOBS, changed_parts(root, JOBS), claims, None)
    assert whole_parts(root) == ["a/0", "a/3"] == sorted(f"a/{p.name}" for p in (root / "a" / "64").iterdir())
    assert [path.exists() for path in hashes] == [True, False]
    assert not schema.Card.load(root).complete


def test_one_that_another_worker_made_meanwhile_stays(root: Path, claims: Claims) -> None:
    changed = changed_parts(root, JOBS)
    made(root, "a/1", 2, tar="1.tar", tar_bytes=11, tar_changed="time 1")
    remove_changed(root, JOBS, changed, claims, None)
    assert whole_parts(root) == ["a/0", "a/1", "a/3"]


def test_one_that_another_worker_makes_stays(root: Path, claims: Claims) -> None:
    with Claims(root / schema.WORK / "claims") as other:
        assert other.claim("a/2")
        remove_changed(root, JOBS, changed_parts(root, JOBS), claims, None)
        assert whole_parts(root) == ["a/0", "a/2", "a/3"]


def test_pictures_that_count_to_other_parts_now(root: Path, claims: Claims) -> None:
    made(root, "a/pics-00000", 1, tar="pics", tar_bytes=5, tar_changed="x")
    made(root, "a/pics-00001", 1, tar="pics", tar_bytes=5, tar_changed="y")
    jobs = [Job(SOURCE, "pics-00000", "pics", 5, "x", ("a.jpg",))]
    assert changed_parts(root, jobs) == {"a/pics-00001": "pics has fewer pictures than when a/pics-00001 was made"}
    remove_changed(root, jobs, changed_parts(root, jobs), claims, None)
    assert "a/pics-00001" not in whole_parts(root) and "a/pics-00000" in whole_parts(root)


def test_a_data_set_without_samples_may_be_made_anew(tmp_path: Path) -> None:
    CARD.save(tmp_path)
    assert is_empty(tmp_path)
    schema.write_file(tmp_path, "reports/a/0.json", json.dumps({"written": {}, "sets": {}, "tar_bytes": 1}))
    assert is_empty(tmp_path)
    with Claims(tmp_path / schema.WORK / "claims") as other:
        other.claim("a/1")
        assert not is_empty(tmp_path)  # a worker may be about to write one
    start_anew(tmp_path, None)
    assert whole_parts(tmp_path) == [] and not (tmp_path / schema.CARD).exists()


def test_one_with_a_sample_may_not(root: Path) -> None:
    assert not is_empty(root)
    assert os.listdir(root / "a" / "64")
