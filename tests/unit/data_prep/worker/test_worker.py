"""A worker: a tar that cannot be read is left out, and an error of a thread ends it; test_encode.py has the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.inputs.sources import Job, make_source
from data_prep.pictures.decoders import DecoderPool
from data_prep.worker import worker as module
from data_prep.worker.claims import Claims, claimed_names
from data_prep.worker.encoder import Encoder, Settings
from data_prep.worker.monitor import EncodingMonitor
from data_prep.worker.parts import read_part_report, whole_parts
from data_prep.worker.worker import Worker


@pytest.fixture
def worker(shape_tars: Path, tmp_path: Path) -> Iterator[Worker]:
    """A worker for two tars of ten pictures, at 64 px."""
    jobs = make_source("images", [f"{shape_tars}/*.tar"], None, "").jobs()
    encoder = Encoder("tiny", Settings((64,), False, 300, False, "mean"), "cpu")
    monitor = EncodingMonitor(sum(job.bytes for job in jobs), 0, tmp_path / "tensorboard")
    with Claims(tmp_path / "claims") as claims, DecoderPool(1) as pool:
        yield Worker(tmp_path / "data", encoder.card("bfloat16"), encoder, jobs, claims, pool, monitor)
        assert not claimed_names(tmp_path / "claims")
    monitor.close()


def test_a_tar_that_cannot_be_read_is_left_out(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    read_samples = module.read_samples

    def broken(job: Job, *args: Any) -> Iterator[Any]:
        for number, sample in enumerate(read_samples(job, *args)):
            if number == 3 and "00000" in job.url:
                raise OSError("the line is down")
            yield sample

    monkeypatch.setattr(module, "read_samples", broken)
    worker.run()
    assert {name: str(error) for name, error in worker.failed.items()} == {"images/00000": "the line is down"}
    assert whole_parts(worker.root) == ["images/00001"]
    report = read_part_report(worker.root, "images/00001")
    assert report is not None and report["read"] == 10 and report["written"] == {"64": 10}


@pytest.mark.parametrize("where", ["read_samples", "PartWriter", "expected"])
def test_an_error_of_a_thread_ends_the_worker(worker: Worker, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(module, where, broken)
    with pytest.raises(RuntimeError, match="a defect"):
        worker.run()
    assert whole_parts(worker.root) == []
    for name in claimed_names(worker.claims.folder):  # as a process that ends gives them up
        worker.claims.release(name)
