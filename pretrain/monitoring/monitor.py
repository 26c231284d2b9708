"""Figures of a training, each a curve with its unit in its name, and the log line of each logging step.

Between logging steps figures only add up on the device; at a logging step they are summed over the processes and read once.
Process 0 writes them (`curve_writer.py`). A resumed run continues the sums of its checkpoint's step.

Letters: B images of a micro-batch, K blocks, T bins of the timestep, P parts of the backbone, S sources of the data.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from data_prep.encoders import DOWNSAMPLE
from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.diffusion import Loss
from pretrain.distributed.engine import Engine
from pretrain.distributed.world import all_reduce
from pretrain.gpus import gpu_of
from pretrain.models import ComputeBudget, DiTConfig
from pretrain.models.alignment import Alignment
from pretrain.models.cost import ffn_shares, grid_of, training_flops
from pretrain.models.focusdit.skip import LOW
from pretrain.models.routing import Routing
from pretrain.monitoring.curve_writer import CurveWriter
from pretrain.monitoring.norms import PARTS, PartNorms
from pretrain.monitoring.provenance import config_yaml
from pretrain.monitoring.step_times import StepTimes
from pretrain.state import StepVerdict


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The device's peak for MFU: the data sheet's, or the best of five measured products where it is not listed."""
    if device.type == "cuda":
        gpu = gpu_of(torch.cuda.get_device_name(device))
        if gpu is not None:
            return gpu.bf16_tflops
    a, b = torch.randn(2048, 1024, device=device, dtype=dtype), torch.randn(1024, 1024, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 * 1024 * 1024 / best / 1e12


@dataclass
class Sums:
    """Sums of this process since the last logging step.

    Attributes:
        loss: of the micro-batches' mean losses [1], on the device like the next six.
        bin_loss, bin_count: samples' losses and their number by bin of the timestep [T].
        source_loss, source_count: likewise by source [S].
        masks: of the images' figures of each block's query mask, by bin: mean, variance, share under LOW [3 · K · T].
        alignment: of the micro-batches' alignment losses, and their number [2]; [0] in a run without alignment.
        micro_batches, images, flops: work of this process.
        wait_s: seconds for which training waited for data.
        skipped, clipped, steps: optimizer steps, the same on all processes.
    """

    loss: Tensor
    bin_loss: Tensor
    bin_count: Tensor
    source_loss: Tensor
    source_count: Tensor
    masks: Tensor
    alignment: Tensor
    micro_batches: int = 0
    images: int = 0
    flops: float = 0.0
    wait_s: float = 0.0
    skipped: int = 0
    clipped: int = 0
    steps: int = 0

    @property
    def on_device(self) -> list[Tensor]:
        """The tensors, in the order of a checkpoint."""
        losses = [self.loss, self.bin_loss, self.bin_count, self.source_loss, self.source_count]
        return [*losses, self.masks, self.alignment]


# Fields of Sums on the host: those that differ between processes, and those that are the same on all.
PER_PROCESS, COMMON = ("micro_batches", "images", "flops", "wait_s"), ("skipped", "clipped", "steps")


class Monitor:
    """Collects figures and writes them at logging steps."""

    def __init__(
        self,
        config: Config,
        backbone: DiTConfig,
        engine: Engine,
        steps_per_epoch: int | None = None,
        sources: Sequence[str] = ("",),
    ):
        self.sources = sources
        self.config, self.backbone, self.world = config, backbone, engine.world
        about = {"config": config_yaml(config), "deepspeed": json.dumps(engine.deepspeed, indent=2)}
        self.curves = CurveWriter(config.run_dir, about, writes=self.world.rank == 0)
        peak = config.logging.peak_tflops or peak_tflops(self.world.device, engine.dtype)
        self.peak = peak * 1e12 * self.world.size
        self.grid = grid_of(backbone, config.data.resolution, DOWNSAMPLE)
        self.clipping: float = engine.deepspeed.get("gradient_clipping", 0.0)
        self.batch: int = engine.deepspeed["train_batch_size"]
        self.steps_per_epoch, self.norms, self.times = steps_per_epoch, PartNorms(engine), StepTimes(self.world)
        self.ffn_shares = ffn_shares(backbone, self.grid)
        self.gpu_s, self.started = 0.0, time.perf_counter()
        self.sums, self.since = self._zeros(), time.perf_counter()

    def resume(self, step: int, pending_sums: list[float]) -> None:
        """Continues the curves after a step; later points are removed, at step 0 all of them.

        Args:
            pending_sums: those of a checkpoint of that step; [] for none.
        """
        self.curves.resume(step)
        self.sums, self.since = self._zeros(), time.perf_counter()
        self.gpu_s, self.started = 0.0, self.since
        self.times.begin()
        s = self.sums
        sizes = [len(tensor) for tensor in s.on_device]
        fields = PER_PROCESS + COMMON
        if len(pending_sums) != sum(sizes) + len(fields) + 2:
            return  # none, or those of an earlier version or of other bins: the next point is of the steps from here on
        *host, seconds, self.gpu_s = pending_sums[sum(sizes) :]
        for tensor, values in zip(s.on_device, torch.tensor(pending_sums[: sum(sizes)]).split(sizes), strict=True):
            tensor.copy_(values)
        vars(s).update({name: type(getattr(s, name))(v) for name, v in zip(fields, host, strict=True)})
        self.since -= seconds

    def pending_sums(self) -> list[float]:
        """The sums since the last logging step, for a checkpoint; the points before them are flushed to disk.

        A checkpoint adds them up over all processes, so process 0 alone counts what is the same on all.
        """
        self.curves.flush()
        s, first = self.sums, self.world.rank == 0
        common = [float(getattr(s, name)) if first else 0.0 for name in COMMON]
        seconds = [time.perf_counter() - self.since, self._gpu_seconds()] if first else [0.0, 0.0]
        return [*torch.cat(s.on_device).tolist(), *(float(getattr(s, name)) for name in PER_PROCESS), *common, *seconds]

    def _zeros(self) -> Sums:
        def zeros(n: int) -> Tensor:
            return torch.zeros(n, device=self.world.device)

        bins = self.config.logging.timestep_bins
        by_bin, by_source = (zeros(bins), zeros(bins)), (zeros(len(self.sources)), zeros(len(self.sources)))
        masks, aligned = 3 * self.backbone.depth * bins, 2 if self.config.alignment.weight else 0
        return Sums(zeros(1), *by_bin, *by_source, zeros(masks), zeros(aligned))

    def _gpu_seconds(self) -> float:
        """Seconds of all processes in this run up to now, pauses included; those after a killed start's checkpoint are not."""
        return self.gpu_s + self.world.size * (time.perf_counter() - self.started)

    def forward(self) -> AbstractContextManager[None]:
        """Times a forward pass within it, without waiting for the device."""
        return self.times.forward()

    def add_data_wait(self, seconds: float) -> None:
        """Adds the time that a step waited for data."""
        self.sums.wait_s += seconds

    @torch.no_grad()
    def record(
        self,
        batch: Batch,
        loss: Loss,
        masks_3KB: Tensor | None,
        budget: ComputeBudget,
        routing: Routing | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        """Adds one micro-batch, without waiting for the device; `routing` and `alignment` are those of its step.

        Args:
            masks_3KB: `Prediction.mask_statistics_3KB`.
        """
        s = self.sums
        bins = len(s.bin_loss)
        bin_B = (loss.timestep_B * (bins / 1000)).long().clamp(0, bins - 1)
        s.loss += loss.mean.detach()
        s.bin_loss.index_add_(0, bin_B, loss.per_sample_B)
        s.bin_count.index_add_(0, bin_B, torch.ones_like(loss.per_sample_B))
        if len(self.sources) > 1:
            source_B = torch.tensor(batch.sources).to(bin_B.device, non_blocking=True)
            s.source_loss.index_add_(0, source_B, loss.per_sample_B)
            s.source_count.index_add_(0, source_B, torch.ones_like(loss.per_sample_B))
        if masks_3KB is not None:
            s.masks.view(3, -1, bins).index_add_(2, bin_B, masks_3KB)
        if loss.alignment is not None:
            s.alignment += torch.stack([loss.alignment.detach(), torch.ones_like(loss.alignment)])
        s.micro_batches += 1
        s.images += len(batch.keys)
        images, text, features = len(batch.keys), sum(batch.text.lengths), 0
        if alignment is not None:
            assert batch.features_BhwF is not None
            features = batch.features_BhwF.shape[-1]
        s.flops += training_flops(self.backbone, images, self.grid, text, budget, routing, alignment, features)

    def step(self, step: int, verdict: StepVerdict, lr: float) -> None:
        """Counts optimizer step number `step` (from 1), and writes at logging steps. All processes call it."""
        self.sums.steps += 1
        self.sums.skipped += verdict.fault is not None
        self.sums.clipped += verdict.fault is None and 0 < self.clipping < verdict.norm
        self.times.end_step()
        if step % self.config.logging.every == 0 or step == self.config.steps:
            self._write(step, verdict, lr)
            self.sums, self.since = self._zeros(), time.perf_counter()

    def _write(self, step: int, verdict: StepVerdict, lr: float) -> None:
        s, bins = self.sums, len(self.sums.bin_loss)
        host = torch.tensor([s.micro_batches, s.images, s.flops / 1e12, s.wait_s], device=self.world.device)
        sums = all_reduce(torch.cat([*s.on_device, host, self.norms.squares_2P().flatten()]), self.world)
        sizes = [*(len(tensor) for tensor in s.on_device), len(host), 2 * len(PARTS)]
        parts = sums.cpu().split(sizes)
        loss, bin_loss, bin_count, source_loss, source_count, masks, alignment, host, squares = parts
        times = self.times.of_all()
        if self.world.rank != 0:
            return
        seconds = time.perf_counter() - self.since
        micro, images, tflops, wait = host.tolist()
        scalars = {
            "train/loss": loss.item() / micro,
            "train/gradient_norm": verdict.norm,
            "train/learning_rate": lr,
            "train/steps_skipped": float(s.skipped),
            "train/steps_clipped_percent": 100 * s.clipped / s.steps,
            "speed/images_per_s": images / seconds,
            "speed/tokens_per_s": images * math.prod(self.grid) / seconds,
            "speed/step_s": seconds / s.steps,
            "speed/data_wait_percent": 100 * wait / self.world.size / seconds,
            "speed/mfu_percent": 100 * tflops * 1e12 / (seconds * self.peak),
            **times.scalars(),
            **self._progress(step, seconds / s.steps),
            **_by_bin("loss_by_timestep/", bin_loss, bin_count),
            **self._source_scalars(source_loss, source_count),
            **self._norm_scalars(squares.view(2, -1), lr if verdict.fault is None else 0.0),
        }
        if len(alignment) and alignment[1]:
            scalars["alignment/negative_cosine"] = (alignment[0] / alignment[1]).item()
        if self.backbone.mask != "none":
            scalars |= self._mask_scalars(masks.view(3, -1, bins), bin_count)
        self.scalars(scalars, step)
        print(
            f"step {step}/{self.config.steps}  loss {scalars['train/loss']:.4f}  norm {scalars['train/gradient_norm']:.2f}  "
            f"lr {lr:.2e}  {scalars['speed/images_per_s']:.1f} images/s  MFU {scalars['speed/mfu_percent']:.0f}%  "
            f"wait {scalars['speed/data_wait_percent']:.0f}%  {_clock(3600 * scalars['progress/hours_to_go'])} to go",
            flush=True,
        )

    def _progress(self, step: int, step_s: float) -> dict[str, float]:
        """Progress so far, and the time to go at the last interval's speed, without checkpoints, previews and validations."""
        images, seconds = step * self.batch, (self.config.steps - step) * step_s
        scalars = {
            "progress/images": float(images),
            "progress/tokens": float(images * math.prod(self.grid)),
            "progress/hours_to_go": seconds / 3600,
            "progress/gpu_days_so_far": self._gpu_seconds() / 86400,
            "progress/gpu_days_to_go": self.world.size * seconds / 86400,
        }
        return scalars | ({"progress/epochs": step / self.steps_per_epoch} if self.steps_per_epoch else {})

    def _source_scalars(self, loss_S: Tensor, count_S: Tensor) -> dict[str, float]:
        """The mean loss of each source that has samples, where there are several."""
        means = zip(self.sources, loss_S.tolist(), count_S.tolist(), strict=True)
        return {
            f"loss_by_source/{name}": loss / count for name, loss, count in means if count and len(self.sources) > 1
        }

    def _norm_scalars(self, squares_2P: Tensor, lr: float) -> dict[str, float]:
        """Norms by part; those of updates are AdamW's, so there are none with Muon. `lr` is 0 for a skipped step."""
        parameters_P, updates_P = squares_2P.sqrt().tolist()
        there = [part for part, norm in zip(PARTS, parameters_P, strict=True) if norm]
        scalars = {f"parameter_norm/{part}": parameters_P[PARTS.index(part)] for part in there}
        if self.config.optimizer.name == "adamw":
            scalars |= {f"update_norm/{part}": lr * updates_P[PARTS.index(part)] if lr else 0.0 for part in there}
        return scalars

    def _mask_scalars(self, masks_3KT: Tensor, count_T: Tensor) -> dict[str, float]:
        """Figures of each block's query mask, the mean by bin of the timestep, and what skipping under LOW would save."""
        mean_K, variance_K, low_K = (masks_3KT.sum(2) / count_T.sum()).unbind()
        scalars = {}
        for k in range(self.backbone.depth):
            scalars[f"mask_mean/block_{k:02d}"] = mean_K[k].item()
            scalars[f"mask_spread/block_{k:02d}"] = variance_K[k].sqrt().item()
            scalars[f"mask_under_{LOW}_percent/block_{k:02d}"] = 100 * low_K[k].item()
            scalars |= _by_bin(f"mask_mean_by_timestep/block_{k:02d}_", masks_3KT[0, k], count_T)
        saved = sum(share * low for share, low in zip(self.ffn_shares, low_K.tolist(), strict=True))
        return scalars | {f"mask_saving/flops_percent_under_{LOW}": 100 * saved}

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Writes a point of each curve."""
        self.curves.scalars(values, step)

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """Writes a picture."""
        self.curves.image(tag, image, step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent within it (checkpoints, previews, validation) from the speed."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start
        self.times.begin()

    def record_checkpoint_pause(self, step: int, seconds: float) -> None:
        """Writes for how long training stood still for a checkpoint."""
        self.scalars({"speed/checkpoint_stop_s": seconds}, step)

    def close(self) -> None:
        """Closes the event file."""
        self.curves.close()


def _by_bin(prefix: str, sums_T: Tensor, count_T: Tensor) -> dict[str, float]:
    """The mean of each bin of the timestep that has samples."""
    edges = [1000 * i // len(sums_T) for i in range(len(sums_T) + 1)]
    return {
        f"{prefix}{low:04d}_to_{high:04d}": (total / count).item()
        for low, high, total, count in zip(edges, edges[1:], sums_T, count_T, strict=False)
        if count > 0
    }


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:05:09."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
