"""The monitor of an encoding: its rates by a clock that the test sets, its lines and its curves."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import scalars

from data_prep.common import progress
from data_prep.worker import monitor
from data_prep.worker.monitor import EncodingMonitor


class Clock:
    """A clock that a test sets by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    hand = Clock()
    monkeypatch.setattr(progress, "time", hand)
    monkeypatch.setattr(monitor, "time", hand)
    return hand


def test_rates_lines_and_curves(clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 10,000 bytes 2,000 were encoded before; in 40 s this worker reads 80 pictures of 25 bytes each."""
    shown = EncodingMonitor(10_000, 2_000, tmp_path / "tensorboard")
    for number in range(80):
        clock.now += 0.5
        shown.count_waiting(0.1)
        shown.count_sample(number % 8 == 0, 25)
    assert shown.images_per_second == pytest.approx(2)
    assert shown.hours_left == pytest.approx(6000 / 50 / 3600)
    shown.set_encoded(6_000)  # the other workers went on, too
    assert shown.hours_left == pytest.approx(4000 / 100 / 3600)
    assert shown.dropped_share == pytest.approx(1 / 8) and shown.waited_share == pytest.approx(0.2)
    shown.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "20.0% of the tars' bytes are encoded by all workers; this one has read 60 images, dropped 13.33%, "
        "2.0 images/s, the encoders waited 20.0%; about 2 min left"
    )
    rates = scalars(tmp_path, "encode/images_per_s")
    assert list(rates) == [21, 42, 63, 80] and set(rates.values()) == {2.0}
    assert scalars(tmp_path, "encode/dropped_share")[80] == pytest.approx(0.125)
    assert scalars(tmp_path, "encode/memory_gib")[80] > 0.01


def test_nothing_read_is_no_point(tmp_path: Path) -> None:
    EncodingMonitor(10, 0, tmp_path).close()
    (file,) = tmp_path.iterdir()
    assert b"encode/" not in file.read_bytes()


def test_the_bar_ends_at_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tars hold more than pictures, and other workers encode some of them."""
    shown: list[int] = []
    monkeypatch.setattr(progress.Progress, "update", lambda self, count=1: shown.append(count))
    bar = EncodingMonitor(1000, 100, tmp_path)
    bar.count_sample(False, 270)
    bar.count_sample(True, 0)
    bar.finish_tar(30)
    assert shown == [270, 0, 30]
    bar.set_encoded(300)  # the own tar is not among them yet
    assert sum(shown) == 300
    bar.set_encoded(700)
    bar.count_sample(False, 250)  # 650 in all: others' 300 hide it
    assert sum(shown) == 600
    bar.set_encoded(1000)
    assert 100 + sum(shown) == 1000
