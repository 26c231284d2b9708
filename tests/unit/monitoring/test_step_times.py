"""Percentiles and the slowest process, by a clock that the test moves."""

from __future__ import annotations

import pytest
import torch

from pretrain.distributed.world import World
from pretrain.monitoring import step_times
from pretrain.monitoring.step_times import StepTimes, TimesOfAll


class HandClock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_percentiles_of_the_steps_since_the_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock()
    monkeypatch.setattr(step_times, "time", clock)
    times = StepTimes(World.alone())
    for seconds in range(1, 21):
        with times.forward():
            clock.now += 0.25
        clock.now += seconds - 0.25
        times.end_step()
    clock.now += 1000  # a pause
    times.begin()
    figures = times.of_all()
    assert figures.p50.tolist() == [10.5]
    assert figures.p95.tolist() == pytest.approx([19.05])  # between the 19th and the 20th of 20
    assert figures.forward.tolist() == [5]
    clock.now += 3
    times.end_step()
    assert times.of_all().p95.tolist() == [3]


def test_the_slowest_process_is_named_with_how_far_it_is_behind() -> None:
    p50, p95 = torch.tensor([1.0, 1.5, 1.2]), torch.tensor([2.0, 1.9, 2.5])
    figures = TimesOfAll(p50, p95, torch.tensor([10.0, 10.0, 12.0]), torch.tensor([3.0, 4.0, 2.0]))
    assert figures.scalars() == {
        "speed/step_p50_s": 1.5,
        "speed/step_p95_s": 2.5,
        "speed/slowest_process": 2,
        "speed/slowest_process_behind_percent": pytest.approx(20),
        "memory/peak_gib": 4,
        **{f"process_step_p50_s/00{rank}": p50[rank] for rank in range(3)},
        **{f"process_step_p95_s/00{rank}": p95[rank] for rank in range(3)},
        "process_forward_s/000": 10,
        "process_forward_s/001": 10,
        "process_forward_s/002": 12,
    }


@pytest.mark.parametrize(("processes", "curves"), [(1, 0), (64, 3 * 64), (65, 0)])
def test_few_processes_have_curves_of_their_own(processes: int, curves: int) -> None:
    figures = TimesOfAll(*(torch.ones(processes) for _ in range(4))).scalars()
    assert len([tag for tag in figures if tag.startswith("process_")]) == curves
