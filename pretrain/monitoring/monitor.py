"""What TensorBoard shows: curves with their unit in the name, sample grids, mask maps.

Between logging steps figures only add up on the device; at a logging step they are summed over the processes and read once.
Process 0 writes. A resumed run takes up the curves where its checkpoint was; points after it are purged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.diffusion import Loss
from pretrain.distributed.engine import Engine
from pretrain.distributed.world import all_reduce
from pretrain.models import ComputeBudget, DiTConfig
from pretrain.models.cost import grid_of, training_flops
from pretrain.resilience.spike_guard import StepVerdict

# Dense bf16 peaks of the data sheets, in TFLOP/s, by a part of the device's name.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
}


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The device's peak for MFU: the data sheet's, or the best of five measured products where it is not listed."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_TFLOPS.items():
            if part in name:
                return peak
    a, b = torch.randn(2048, 1024, device=device, dtype=dtype), torch.randn(1024, 1024, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 * 1024 * 1024 / best / 1e12


@dataclass
class Totals:
    """Sums since the last logging step: tensors on the device, and the host's own."""

    loss: Tensor
    bin_loss: Tensor
    bin_count: Tensor
    masks: Tensor
    micro_batches: int = 0
    images: int = 0
    flops: float = 0.0
    wait_s: float = 0.0
    skipped: int = 0
    steps: int = 0

    @property
    def on_device(self) -> list[Tensor]:
        return [self.loss, self.bin_loss, self.bin_count, self.masks]


# Totals' fields on the host: those that add up over processes, and those that all processes count alike.
SHARED, ALIKE = ("micro_batches", "images", "flops", "wait_s"), ("skipped", "steps")


class Monitor:
    """Collects figures and writes them at logging steps."""

    def __init__(self, config: Config, backbone: DiTConfig, engine: Engine):
        self.config, self.backbone, self.world = config, backbone, engine.world
        self.writer: SummaryWriter | None = None
        peak = config.logging.peak_tflops or peak_tflops(self.world.device, engine.dtype)
        self.peak = peak * 1e12 * self.world.size
        self.grid = grid_of(backbone, config.data.resolution)
        self.totals, self.since = self._zeros(), time.perf_counter()

    def begin(self, step: int, sums: list[float]) -> None:
        """Goes on after this step, with the sums that `sums` gave there ([] for none); later points of the curves are purged."""
        if self.writer is not None:
            self.close()
        if self.world.rank == 0:
            self.writer = self._open(purge_step=step + 1 if step else None)
        self.totals, self.since = self._zeros(), time.perf_counter()
        if sums:
            t = self.totals
            sizes = [len(total) for total in t.on_device]
            *host, seconds = sums[sum(sizes) :]
            for total, values in zip(t.on_device, torch.tensor(sums[: sum(sizes)]).split(sizes), strict=True):
                total.copy_(values)
            vars(t).update({name: type(getattr(t, name))(v) for name, v in zip(SHARED + ALIKE, host, strict=True)})
            self.since -= seconds

    def sums(self) -> list[float]:
        """What has added up since the last logging step, for a checkpoint; what was written is safe on disk after it.

        Over all processes they sum up to the run's, so process 0 alone tells what all count alike.
        """
        self._put(lambda writer: writer.flush())
        t, first = self.totals, self.world.rank == 0
        alike = [float(getattr(t, name)) if first else 0.0 for name in ALIKE]
        seconds = time.perf_counter() - self.since if first else 0.0
        return [*torch.cat(t.on_device).tolist(), *(float(getattr(t, name)) for name in SHARED), *alike, seconds]

    def _zeros(self) -> Totals:
        def zeros(n: int) -> Tensor:
            return torch.zeros(n, device=self.world.device)

        bins = self.config.logging.timestep_bins
        return Totals(zeros(1), zeros(bins), zeros(bins), zeros(self.backbone.depth))

    def waited(self, seconds: float) -> None:
        """Time that the step waited for data."""
        self.totals.wait_s += seconds

    @torch.no_grad()
    def record(self, batch: Batch, loss: Loss, masks_KBN: Tensor | None, budget: ComputeBudget) -> None:
        """Adds one micro-batch, without asking the device for anything."""
        t = self.totals
        bins = len(t.bin_loss)
        place = (loss.timestep_B * (bins / 1000)).long().clamp(0, bins - 1)
        t.loss += loss.mean.detach()
        t.bin_loss.index_add_(0, place, loss.per_sample_B)
        t.bin_count.index_add_(0, place, torch.ones_like(loss.per_sample_B))
        if masks_KBN is not None:
            t.masks += masks_KBN.detach().float().mean(dim=(1, 2))
        t.micro_batches += 1
        t.images += len(batch.keys)
        t.flops += training_flops(self.backbone, len(batch.keys), self.grid, sum(batch.text.lengths), budget)

    def step(self, step: int, verdict: StepVerdict, lr: float) -> None:
        """After optimizer step number `step` (from 1); writes at logging steps. All processes call it."""
        self.totals.steps += 1
        self.totals.skipped += verdict.fault is not None
        if step % self.config.logging.every == 0 or step == self.config.steps:
            self._write(step, verdict, lr)
            self.totals, self.since = self._zeros(), time.perf_counter()

    def _write(self, step: int, verdict: StepVerdict, lr: float) -> None:
        t = self.totals
        host = torch.tensor([t.micro_batches, t.images, t.flops / 1e12, t.wait_s], device=self.world.device)
        sums = all_reduce(torch.cat([*t.on_device, host]), self.world)
        bins, blocks = len(t.bin_loss), len(t.masks)
        loss, bin_loss, bin_count, masks, host = sums.cpu().split([1, bins, bins, blocks, 4])
        if self.world.rank != 0:
            return
        seconds = time.perf_counter() - self.since
        micro, images, tflops, wait = host.tolist()
        scalars = {
            "train/loss": loss.item() / micro,
            "train/gradient_norm": verdict.norm,
            "train/learning_rate": lr,
            "train/steps_skipped": float(t.skipped),
            "speed/images_per_s": images / seconds,
            "speed/tokens_per_s": images * math.prod(self.grid) / seconds,
            "speed/step_s": seconds / t.steps,
            "speed/data_wait_percent": 100 * wait / self.world.size / seconds,
            "speed/mfu_percent": 100 * tflops * 1e12 / (seconds * self.peak),
        }
        for i in range(bins):
            if bin_count[i] > 0:
                low, high = 1000 * i // bins, 1000 * (i + 1) // bins
                scalars[f"loss_by_timestep/{low:04d}_to_{high:04d}"] = (bin_loss[i] / bin_count[i]).item()
        if self.backbone.mask != "none":
            scalars |= {f"mask_mean/block_{k:02d}": (masks[k] / micro).item() for k in range(blocks)}
        if self.world.device.type == "cuda":
            scalars["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        for tag, value in scalars.items():
            self._put(lambda writer, tag=tag, value=value: writer.add_scalar(tag, value, step))  # type: ignore[misc]
        eta = (self.config.steps - step) * seconds / t.steps
        print(
            f"step {step}/{self.config.steps}  loss {scalars['train/loss']:.4f}  norm {scalars['train/gradient_norm']:.2f}  "
            f"lr {lr:.2e}  {scalars['speed/images_per_s']:.1f} images/s  MFU {scalars['speed/mfu_percent']:.0f}%  "
            f"wait {scalars['speed/data_wait_percent']:.0f}%  {_clock(eta)} to go",
            flush=True,
        )

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        self._put(lambda writer: writer.add_image(tag, np.asarray(image), step, dataformats="HWC"))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what is done within it (checkpoints, previews) out of the speed."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def stood_still(self, step: int, seconds: float) -> None:
        """Training waited so long for a checkpoint."""
        self._put(lambda writer: writer.add_scalar("speed/checkpoint_stop_s", seconds, step))

    def close(self) -> None:
        self._put(lambda writer: writer.close())
        self.writer = None

    def _open(self, purge_step: int | None = None) -> SummaryWriter:
        return SummaryWriter(str(self.config.run_dir / "tensorboard"), purge_step=purge_step, flush_secs=10)

    def _put(self, write: Callable[[SummaryWriter], object]) -> None:
        """Writes, on process 0. On a full disk points are lost, training is not: a new file is tried at the next one."""
        if self.world.rank != 0:
            return
        try:
            self.writer = self.writer or self._open()
            write(self.writer)
        except OSError as error:
            print(
                f"WARNING: TensorBoard's file cannot be written ({error}); its points are lost until it can", flush=True
            )
            self.writer = None


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
