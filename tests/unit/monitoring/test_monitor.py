"""Curves against figures computed by hand, a resumed monitor against one never interrupted; the clock is moved by hand."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
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
from pretrain.models.cost import ffn_shares, training_flops
from pretrain.monitoring import monitor as monitor_module
from pretrain.monitoring import step_times
from pretrain.monitoring.curve_writer import METRICS
from pretrain.monitoring.monitor import Monitor, peak_tflops
from pretrain.monitoring.panels import PANELS
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
    for module in (monitor_module, step_times):
        monkeypatch.setattr(module, "time", hand)
    return hand


def made(run_dir: Path, *overrides: str, rank: int = 0, size: int = 1, sources: tuple[str, ...] = ("only",)) -> Monitor:
    words = [f"run_dir={run_dir}", "data.path=/set", "steps=20", "optimizer.warmup_steps=1", "logging.every=2"]
    config = load("demo_256", [*words, "logging.peak_tflops=0.001", "logging.timestep_bins=4", *overrides])[0]
    deepspeed = {"gradient_clipping": 4.0, "train_batch_size": 4 * size}
    world = World(rank, size, torch.device("cpu"))
    engine: Any = SimpleNamespace(world=world, dtype=torch.float32, deepspeed=deepspeed, slots=[], masters=[])
    return Monitor(config, config.model.backbone(), engine, steps_per_epoch=8, sources=sources)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]


def points(run_dir: Path, tag: str) -> dict[int, float]:
    """A curve of metrics.jsonl, by step."""
    return {line["step"]: line[tag] for line in lines(run_dir)}


def test_the_alignment_has_a_curve_of_its_own_while_it_is_on(tmp_path: Path, clock: HandClock) -> None:
    """The mean over the interval's aligned micro-batches, across a checkpoint; its FLOPs count while it is on."""
    monitor = made(tmp_path, "alignment.weight=0.5", "alignment.hidden=8")
    alignment = monitor.config.alignment.build(monitor.backbone)
    batch: Any = SimpleNamespace(
        keys=("a", "b"), text=SimpleNamespace(lengths=LENGTHS), features_BhwF=torch.zeros(2, 4, 4, 7)
    )

    def take(number: int, value: float | None) -> None:
        loss = Loss(torch.tensor(1.0), torch.ones(2), torch.full((2,), 100.0))
        if value is None:
            monitor.record(batch, loss, None, ComputeBudget())
        else:
            loss = replace(loss, alignment=torch.tensor(value, requires_grad=True), alignment_weight=0.5)
            monitor.record(batch, loss, None, ComputeBudget(), None, alignment)
        clock.now += 1
        monitor.step(number, APPLIED, 1e-3)

    monitor.resume(0, [])
    take(1, -0.25)
    sums = monitor.pending_sums()
    monitor.resume(1, sums)
    take(2, -0.75)
    take(3, -0.5)
    take(4, None)
    take(5, None)
    take(6, None)
    monitor.close()
    assert scalars(tmp_path, "alignment/negative_cosine") == {2: -0.5, 4: -0.5}
    assert scalars(tmp_path, "train/loss") == {2: 1.0, 4: 1.0, 6: 1.0}
    plain = 2 * training_flops(monitor.backbone, 2, monitor.grid, sum(LENGTHS))
    both = plain + 12 * 2 * alignment.macs(monitor.backbone.width, 7, math.prod(monitor.grid))
    mfu = scalars(tmp_path, "speed/mfu_percent")
    assert mfu[6] == pytest.approx(100 * plain / (2 * 1e9), rel=1e-5)
    assert mfu[2] == pytest.approx(100 * both / (2 * 1e9), rel=1e-5)


def micro_batch(monitor: Monitor, losses: tuple[float, float], timesteps: tuple[float, float]) -> None:
    """Two samples; a block's masks have its number as mean, twice its number as spread, a tenth of its number under LOW."""
    per_sample = torch.tensor(losses)
    k = torch.arange(monitor.backbone.depth, dtype=torch.float32)
    masks = torch.stack([k, 4 * k**2, k / 10])[..., None] * torch.tensor([0.5, 1.5])
    batch: Any = SimpleNamespace(keys=("a", "b"), sources=(0, 2), text=SimpleNamespace(lengths=LENGTHS))
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
    assert value("train/steps_clipped_percent") == 0  # the one above the bound was skipped
    assert value("mask_mean/block_01") == 1  # of 0.5 and 1.5 in each micro-batch
    assert value("mask_spread/block_01") == 2
    assert value("mask_under_0.15_percent/block_01") == pytest.approx(10)
    assert value("mask_mean_by_timestep/block_01_0000_to_0250") == 0.5
    assert value("mask_mean_by_timestep/block_01_0750_to_1000") == 1.5
    saved = sum(share * k / 10 for k, share in enumerate(ffn_shares(monitor.backbone, monitor.grid)))
    assert value("mask_saving/flops_percent_under_0.15") == pytest.approx(100 * saved)
    assert value("progress/images") == 8
    assert value("progress/tokens") == 8 * math.prod(monitor.grid)
    assert value("progress/epochs") == 0.25
    assert value("progress/hours_to_go") == pytest.approx(18 * 2 / 3600)
    assert value("progress/gpu_days_so_far") == pytest.approx(4 / 86400)
    assert value("progress/gpu_days_to_go") == pytest.approx(36 / 86400)
    assert value("speed/step_p50_s") == value("speed/step_p95_s") == 2
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
    tags += ("mask_spread/block_01", "train/steps_clipped_percent", "mask_mean_by_timestep/block_01_0000_to_0250")
    for name in ("straight", "halves"):
        monitor = made(tmp_path / name)
        monitor.resume(0, [])
        for number in range(1, 5):
            if name == "halves" and number == 4:
                saved = monitor.pending_sums()  # after step 3, between two logging steps
                step(monitor, clock, 4)  # lost with its point, as the process is killed
                monitor.close()
                clock.now += 5000
                time.sleep(1)  # event files are read in the order of the seconds in their names
                monitor = made(tmp_path / name)
                monitor.resume(3, saved)
            step(monitor, clock, number, SKIPPED if number == 3 else APPLIED)
        monitor.close()
    for tag in tags:
        curve = scalars(tmp_path / "straight", tag)
        assert list(curve) == [2, 4] and scalars(tmp_path / "halves", tag) == curve, tag


def test_clipped_steps_are_those_applied_with_a_norm_above_the_bound(tmp_path: Path, clock: HandClock) -> None:
    monitor = made(tmp_path)
    monitor.resume(0, [])
    step(monitor, clock, 1, StepVerdict(1.0, 4.0))  # the bound itself
    step(monitor, clock, 2, StepVerdict(1.0, 4.5))
    monitor.close()
    assert scalars(tmp_path, "train/steps_clipped_percent") == {2: 50}


def test_gpu_days_go_on_after_a_resume(tmp_path: Path, clock: HandClock) -> None:
    monitor = made(tmp_path)
    monitor.resume(0, [])
    step(monitor, clock, 1)
    clock.now += 10  # a pause counts
    saved = monitor.pending_sums()
    clock.now += 10000
    monitor.resume(1, saved)
    step(monitor, clock, 2)
    monitor.close()
    assert points(tmp_path, "progress/gpu_days_so_far") == pytest.approx({2: (2 + 10 + 2) / 86400})


def test_sums_of_another_version_or_of_other_bins_are_left_out(tmp_path: Path, clock: HandClock) -> None:
    monitor = made(tmp_path)
    monitor.resume(0, [])
    step(monitor, clock, 1)
    saved = monitor.pending_sums()
    monitor.close()
    other = made(tmp_path, "logging.timestep_bins=5")
    other.resume(1, saved)
    step(other, clock, 2)
    other.close()
    assert points(tmp_path, "train/loss") == {2: 8}  # of step 2 alone: 4, 12


def test_loss_by_source(tmp_path: Path, clock: HandClock) -> None:
    """The mean over each source's samples; none for a source without samples, nor where there is only one."""
    monitor = made(tmp_path, sources=("art", "maps", "photos"))
    monitor.resume(0, [])
    step(monitor, clock, 1)
    saved = monitor.pending_sums()
    monitor.close()
    resumed = made(tmp_path, sources=("art", "maps", "photos"))
    resumed.resume(1, saved)
    step(resumed, clock, 2)
    resumed.close()
    assert points(tmp_path, "loss_by_source/art") == {2: 4.5}  # 1, 5, 2, 10
    assert points(tmp_path, "loss_by_source/photos") == {2: 7.5}  # 3, 7, 6, 14
    assert not [tag for tag in lines(tmp_path)[0] if tag == "loss_by_source/maps"]


def test_each_curve_is_in_a_panel_and_each_panel_has_a_curve(tmp_path: Path, clock: HandClock) -> None:
    """But for curves of several processes, a GPU, a validation, an evaluation, a checkpoint, an alignment or the parameters."""
    monitor = made(tmp_path, sources=("art", "maps", "photos"))
    monitor.resume(0, [])
    for number in (1, 2):
        step(monitor, clock, number)
    monitor.close()
    tags = lines(tmp_path)[0].keys() - {"step", "time"}
    charts = {re.compile(tag): panel for panel, some in PANELS.items() for regexes in some.values() for tag in regexes}
    assert [tag for tag in tags if not any(chart.match(tag) for chart in charts)] == []
    empty = {chart.pattern.partition("/")[0] for chart in charts if not any(chart.match(tag) for tag in tags)}
    several = {"process_step_p50_s", "process_step_p95_s", "process_forward_s"}
    validated = {"validation", "validation_ema.*", "shared_expert_percent"}
    assert empty == several | validated | {"alignment", "memory", "evaluate", "parameter_norm", "update_norm", "speed"}


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
    micro, images, flops, wait, *common = sums[1][-9:]
    assert (micro, images, wait, common) == (2, 4, 0.5, [0, 0, 0, 0, 0])
    assert sums[0][-5:] == [0, 0, 1, 2, 2]  # steps skipped, clipped, all; seconds, those of all processes
    assert sums[0][:-5] == sums[1][:-5] and flops > 0


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
    monkeypatch.setattr(monitor_module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    assert peak_tflops(torch.device("cpu"), torch.float32) == pytest.approx(2 * 2048 * 1024 * 1024 / 2 / 1e12)
