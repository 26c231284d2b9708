"""The sweep: its points against the simulation and arithmetic, its files, and what does not fit."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.plan import sweep
from pretrain.plan.__main__ import main

WORDS = ["stage1_256", "stage2_512", "--samples", "1e6", "--price", "2", "--sweep", "--jitter", "0.05"]
PARTS = ("compute_s", "waiting_s", "reduction_s", "optimizer_s", "gather_s")


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, str]]]]:
    """The folder, and the rows of sweep.csv, on 1, 16 and 512 GPUs."""
    out = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "COUNTS", (1, 16, 512))
        assert main([*WORDS, "--out", str(out)]) == 0
    with (out / "sweep.csv").open() as file:
        yield out, list(csv.DictReader(file))


def test_every_stage_and_their_sum(points) -> None:
    _, rows = points
    assert len(rows) == 3 * 2 * 3
    for row in rows:
        f = {key: float(row[key]) for key in (*PARTS, "step_s", "efficiency", "hours", "goodput", "gpu_hours", "money")}
        assert sum(f[part] for part in PARTS) == pytest.approx(f["step_s"])
        assert 0 < f["efficiency"] <= 1.01 and 0 < f["goodput"] <= 1
        assert f["money"] == pytest.approx(2 * f["gpu_hours"]) == pytest.approx(2 * f["hours"] * int(row["gpus"]))
    for one, two, both in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert [r["stage"] for r in (one, two, both)] == ["stage1_256", "stage2_512", "all stages"]
        assert float(one["hours"]) + float(two["hours"]) == pytest.approx(float(both["hours"]))


def test_efficiency_counts_gpus_that_stand_idle(points) -> None:
    _, rows = points
    (row,) = [r for r in rows if r["stage"] == "stage2_512" and r["gpus"] == "512" and r["overlap"] == "True"]
    assert row["used"] == "320"
    share = float(row["compute_s"]) / float(row["step_s"]) * 320 / 512
    assert float(row["efficiency"]) == pytest.approx(share, rel=0.01)


def test_overlap_and_more_gpus(points) -> None:
    _, rows = points
    by = {(r["stage"], int(r["gpus"]), r["overlap"] == "True"): r for r in rows}
    for gpus in (16, 512):
        assert float(by["stage1_256", gpus, True]["step_s"]) < float(by["stage1_256", gpus, False]["step_s"])
    efficiency = [float(by["stage1_256", gpus, True]["efficiency"]) for gpus in (1, 16, 512)]
    assert efficiency == sorted(efficiency, reverse=True)
    assert float(by["stage1_256", 1, True]["reduction_s"]) == 0


def test_the_picture_has_its_lines(points) -> None:
    folder, _ = points
    pixels = np.asarray(Image.open(folder / "sweep.png").convert("RGB")).reshape(-1, 3)
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0, 0x9E, 0x73)):
        assert (pixels == colour).all(1).sum() > 500


def test_numbers_of_gpus_on_which_nothing_fits_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """21 GiB of states on one GPU of 24 GiB, of which a fifth is left free."""
    monkeypatch.setattr(sweep, "COUNTS", (1, 16))
    gpu = ["--gpu", "own", "--tflops", "100", "--memory", "24", "--bandwidth", "1"]
    assert main(["stage1_256", "--samples", "1e6", "--sweep", *gpu, "--out", str(tmp_path)]) == 0
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["gpus"] for r in rows} == {"16"} and rows[0]["money"] == ""
