"""Curves against figures computed by hand, a resumed monitor against one never interrupted; the clock is moved by hand."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import scalars
from torch.utils.tensorboard import SummaryWriter

from pretrain.config import load
from pretrain.diffusion import Loss
from pretrain.distributed.world import World
from pretrain.gpus import GPUS
from pretrain.models import ComputeBudget
from pretrain.models.cost import training_flops
from pretrain.monitoring import monitor as module
from pretrain.monitoring.monitor import Monitor, peak_tflops
from pretrain.state import StepVerdict

LENGTHS = (3, 5)
APPLIED, SKIPPED = StepVerdict(1.0, 2.5), StepVerdict(9.0, 9.0, "a spike")


class HandClock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    hand = HandClock()
    monkeypatch.setattr(module, "time", hand)
    return hand


def made(run_dir: Path, *overrides: str, rank: int = 0, size: int = 1) -> Monitor:
    words = [f"run_dir={run_dir}", "data.path=/set", "steps=20", "optimizer.warmup_steps=1", "logging.every=2"]
    config = load("demo_256", [*words, "logging.peak_tflops=0.001", "logging.timestep_bins=4", *overrides])[0]
    engine: Any = SimpleNamespace(
        world=World(rank, size, torch.device("cpu")), dtype=torch.float32, deepspeed={"gradient_clipping": 1.0}
    )
    return Monitor(config, config.model.backbone(), engine)


def micro_batch(monitor: Monitor, losses: tuple[float, float], timesteps: tuple[float, float]) -> None:
    """Two samples; every block's mask is its number."""
    per_sample = torch.tensor(losses)
    depth = monitor.backbone.depth
    masks = torch.arange(depth, dtype=torch.float32)
    batch: Any = SimpleNamespace(keys=("a", "b"), text=SimpleNamespace(lengths=LENGTHS))
    monitor.record(batch, Loss(per_sample.mean(), per_sample, torch.tensor(timesteps)), masks, ComputeBudget())


def step(monitor: Monitor, clock: HandClock, number: int, verdict: StepVerdict = APPLIED) -> None:
    """Two micro-batches in 2 s, half a second of which the data is waited for."""
    monitor.add_data_wait(0.5)
    micro_batch(monitor, (1.0 * number, 3.0 * number), (10.0, 990.0))
    micro_batch(monitor, (5.0 * number, 7.0 * number), (260.0, 1000.0))
    clock.now += 2
    monitor.step(number, verdict, 1e-3)


def test_curves_equal_figures_computed_by_hand(tmp_path: Path, clock: HandClock) -> None:
    monitor = made(tmp_path)
    monitor.resume(0, [])
    step(monitor, clock, 1)
    step(monitor, clock, 2, SKIPPED)
    monitor.close()

    def value(tag: str) -> float:
        curve = scalars(tmp_path, tag)
        assert list(curve) == [2]
        return curve[2]

    assert value("train/loss") == 6  # of the micro-batches' means 2, 6, 4, 12
    assert value("train/gradient_norm") == 9
    assert value("train/learning_rate") == pytest.approx(1e-3)
    assert value("train/steps_skipped") == 1
    assert value("loss_by_timestep/0000_to_0250") == 1.5  # 1, 2
    assert value("loss_by_timestep/0250_to_0500") == 7.5  # 5, 10
    assert value("loss_by_timestep/0750_to_1000") == 7.5  # 3, 7, 6, 14
    assert value("mask_mean/block_01") == 1
    assert value("speed/images_per_s") == 8 / 4
    assert value("speed/step_s") == 2
    assert value("speed/tokens_per_s") == 2 * math.prod(monitor.grid)
    assert value("speed/data_wait_percent") == 25
    flops = 4 * training_flops(monitor.backbone, 2, monitor.grid, sum(LENGTHS))
    assert value("speed/mfu_percent") == pytest.approx(100 * flops / (4 * 1e9), rel=1e-5)
    with pytest.raises(KeyError):
        scalars(tmp_path, "loss_by_timestep/0500_to_0750")  # no sample lies there


def test_the_log_has_a_line_with_the_time_to_go(tmp_path: Path, clock: HandClock, capsys) -> None:
    monitor = made(tmp_path)
    monitor.resume(0, [])
    for number in (1, 2):
        step(monitor, clock, number)
    pattern = r"step 2/20  loss 6.0000  norm 2.50  lr 1.00e-03  2.0 images/s  MFU \d+%  wait 25%  0:00:36 to go\n"
    assert re.fullmatch(pattern, capsys.readouterr().out)


def test_pauses_do_not_count_into_the_speed(tmp_path: Path, clock: HandClock) -> None:
    monitor = made(tmp_path)
    monitor.resume(0, [])
    step(monitor, clock, 1)
    with monitor.paused():
        clock.now += 1000
    step(monitor, clock, 2)
    monitor.close()
    assert scalars(tmp_path, "speed/step_s") == {2: 2}


def test_a_resumed_monitor_continues_the_curves_of_an_uninterrupted_one(tmp_path: Path, clock: HandClock) -> None:
    tags = ("train/loss", "train/steps_skipped", "loss_by_timestep/0250_to_0500", "mask_mean/block_01", "speed/step_s")
    for name in ("straight", "halves"):
        monitor = made(tmp_path / name)
        monitor.resume(0, [])
        for number in range(1, 5):
            if name == "halves" and number == 4:
                saved = monitor.pending_sums()  # after step 3, between two logging steps
                step(monitor, clock, 4)  # lost with its point, as the process is killed
                monitor.close()
                clock.now += 5000
                monitor = made(tmp_path / name)
                monitor.resume(3, saved)
            step(monitor, clock, number, SKIPPED if number == 3 else APPLIED)
        monitor.close()
    for tag in tags:
        curve = scalars(tmp_path / "straight", tag)
        assert list(curve) == [2, 4] and scalars(tmp_path / "halves", tag) == curve, tag


def test_a_run_that_starts_again_from_nothing_starts_its_curves_again(tmp_path: Path) -> None:
    """Killed before its first checkpoint: its points are purged, those before the first step, too."""
    for value in (1.0, 2.0):
        monitor = made(tmp_path)
        monitor.resume(0, [])
        monitor.scalars({"validation/loss": value}, 0)
        monitor.close()
        time.sleep(1)  # event files are read in the order of the seconds in their names
    assert scalars(tmp_path, "validation/loss") == {0: 2.0}


def test_what_is_the_same_on_all_processes_is_counted_by_the_first_alone(tmp_path: Path, clock: HandClock) -> None:
    """A checkpoint adds the sums up over all processes."""
    sums = []
    for rank in (0, 1):
        monitor = made(tmp_path, rank=rank, size=1)
        monitor.resume(0, [])
        step(monitor, clock, 1)
        sums.append(monitor.pending_sums())
    micro, images, flops, wait, *common = sums[1][-7:]
    assert (micro, images, wait, common) == (2, 4, 0.5, [0, 0, 0])
    assert sums[0][-3:] == [0, 1, 2]  # steps skipped, steps, seconds
    assert sums[0][:-3] == sums[1][:-3] and flops > 0


def test_a_full_disk_loses_points_but_not_the_training(tmp_path: Path, clock, capsys, monkeypatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("full")

    monitor = made(tmp_path)
    monitor.resume(0, [])
    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, "add_scalar", full_disk)
        for number in (1, 2):
            step(monitor, clock, number)
    text = "WARNING: TensorBoard's file cannot be written (full); its points are lost until it can"
    assert text in capsys.readouterr().out
    time.sleep(1)  # event files are read in the order of the seconds in their names
    for number in (3, 4):
        step(monitor, clock, number)
    monitor.close()
    assert list(scalars(tmp_path, "train/loss")) == [4]


def test_the_pause_for_a_checkpoint_has_a_curve(tmp_path: Path) -> None:
    monitor = made(tmp_path)
    monitor.resume(0, [])
    monitor.record_checkpoint_pause(5, 0.75)
    monitor.close()
    assert scalars(tmp_path, "speed/checkpoint_stop_s") == {5: 0.75}


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    monitor = made(tmp_path, rank=1)
    monitor.resume(0, [])
    monitor.record_checkpoint_pause(5, 0.75)
    monitor.close()
    assert list(tmp_path.iterdir()) == []


def test_the_peak_is_the_data_sheets_or_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert peak_tflops(torch.device("cuda"), torch.bfloat16) == GPUS["h100-pcie"].bf16_tflops
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_tflops(torch.device("cuda"), torch.bfloat16) == GPUS["h100"].bf16_tflops


def test_a_measured_peak_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five products that seem to take 3, 5, 2, 9 and 4 s."""
    ticks = iter([0, 3, 10, 15, 20, 22, 30, 39, 40, 44])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    assert peak_tflops(torch.device("cpu"), torch.float32) == pytest.approx(2 * 2048 * 1024 * 1024 / 2 / 1e12)
