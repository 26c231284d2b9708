"""One stage of a plan: its model, its batch, and the part of the cluster that it can use.

Letters: M images of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from data_prep.encoders import DOWNSAMPLE
from pretrain.config import Config, load
from pretrain.models import DiTConfig
from pretrain.models.cost import count_activations, count_flops, count_parameters, grid_of, mean_flops, training_phases
from pretrain.models.grids import Grid
from pretrain.plan.encoding import FEATURE_WIDTH
from pretrain.plan.setting import Cluster, Setting
from pretrain.resilience.capacity import GIB, States, checkpoint_bytes, states

# What states and activations may take; the rest is for NCCL's buffers, the allocator's gaps and workspaces.
USABLE = 0.8
HOST_COPY_GBS = 20.0  # assumed: from a GPU to pinned host memory over PCIe
NCCL_GIB = 1.0  # assumed: its channels' buffers; this project's reductions are done in place


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of `images` on each GPU, and whether the blocks are recomputed in the backward pass."""

    images: int
    recompute: bool


@dataclass(frozen=True)
class Stage:
    """A stage on a cluster.

    Attributes:
        cluster: the part of the setting's that it uses: its GPUs divide the global batch.
    """

    name: str
    config: Config
    deepspeed: dict[str, Any]
    setting: Setting
    cluster: Cluster

    @classmethod
    def load(cls, name: str, overrides: list[str], setting: Setting) -> Stage:
        """Reads a stage's config. Raises ConfigError with all its problems."""
        config, deepspeed = load(name, overrides)
        return cls(name, config, deepspeed, setting, setting.cluster.dividing(deepspeed["train_batch_size"]))

    def on(self, gpus: int) -> Stage:
        """The same stage where the cluster has another number of GPUs in all."""
        setting = replace(self.setting, cluster=self.setting.cluster.of(gpus))
        return replace(self, setting=setting, cluster=setting.cluster.dividing(self.batch))

    @property
    def batch(self) -> int:
        """The global batch."""
        return int(self.deepspeed["train_batch_size"])

    @property
    def bf16(self) -> bool:
        return bool(self.deepspeed.get("bf16", {}).get("enabled"))

    @cached_property
    def model(self) -> DiTConfig:
        return self.config.model.backbone()

    @cached_property
    def grid(self) -> Grid:
        return grid_of(self.model, self.config.data.resolution, DOWNSAMPLE)

    @cached_property
    def parameters(self) -> int:
        return count_parameters(self.model).total

    @cached_property
    def forward_flops(self) -> int:
        """FLOPs of one image's forward pass."""
        return count_flops(self.model, self.grid, self.setting.caption_tokens).total

    @cached_property
    def training_flops(self) -> float:
        """FLOPs of one image's training: three forward passes, in the mean over all steps where a method is for some.

        What `recompute` repeats is not counted, as in MFU.
        """
        config, model, tokens = self.config, self.model, self.setting.caption_tokens
        methods = config.routing.build(model), config.alignment.build(model)
        return mean_flops(training_phases(model, self.grid, tokens, config.steps, *methods, self.feature_width))

    @property
    def feature_width(self) -> int:
        """The width of the features in the data set that an aligned stage needs; 0 for none."""
        return FEATURE_WIDTH if self.config.alignment.weight else 0

    @property
    def flops(self) -> float:
        """FLOPs of all steps."""
        return float(self.config.steps) * self.batch * self.training_flops

    # ---- memory of a GPU ----

    @property
    def states(self) -> States:
        return states(self.config, self.deepspeed, self.cluster.gpus)

    def activations(self, micro: MicroBatch) -> float:
        """Bytes that a micro-batch keeps for its backward pass."""
        tokens = self.setting.caption_tokens
        width = 1 if self.bf16 else 2
        return width * micro.images * count_activations(self.model, self.grid, tokens, recompute=micro.recompute)

    def largest_micro(self, recompute: bool) -> int:
        """The largest M that divides the batch on these GPUs and fits in their memory; 0 where none does."""
        share = self.batch // self.cluster.gpus
        room = USABLE * self.cluster.gpu.memory_gib * GIB - self.states.total
        fitting = [
            m for m in range(1, share + 1) if share % m == 0 and self.activations(MicroBatch(m, recompute)) <= room
        ]
        return max(fitting, default=0)

    @cached_property
    def fitting_micro(self) -> MicroBatch | None:
        """The largest micro-batch; with recomputation only where the config asks for it, or nothing fits without."""
        for recompute in (self.config.model.recompute, True):
            if images := self.largest_micro(recompute):
                return MicroBatch(images, recompute)
        return None

    @property
    def micro(self) -> MicroBatch:
        """The largest micro-batch. Raises ValueError where not even one image fits."""
        if self.fitting_micro is not None:
            return self.fitting_micro
        raise ValueError(
            f"{self.name}: its states take {self.states.total / GIB:.1f} GiB on each of {self.cluster.gpus} GPUs, and with one "
            f"image's activations they do not fit in {USABLE:.0%} of {self.cluster.gpu.memory_gib:g} GiB; take more GPUs, "
            "GPUs with more memory, or a smaller model.preset"
        )

    # ---- time ----

    @property
    def step_s(self) -> float:
        """Seconds of a step at the setting's MFU."""
        rate = self.cluster.gpus * self.cluster.gpu.bf16_tflops * 1e12 * self.setting.mfu
        return self.batch * self.training_flops / rate

    @property
    def hours(self) -> float:
        return self.config.steps * self.step_s / 3600

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the stage on all of the setting's GPUs: those that the batch leaves idle are paid for, too."""
        return self.hours * self.setting.cluster.gpus

    # ---- checkpoints ----

    @property
    def checkpoint_write_s(self) -> float:
        """Seconds in which one checkpoint is written."""
        return checkpoint_bytes(self.config) / self.cluster.disk_gbs / 1e9

    @property
    def checkpoint_stop_s(self) -> float:
        """Seconds for which training stands still for one: a copy to host memory, or the whole writing."""
        if not self.config.checkpoint.background:
            return self.checkpoint_write_s
        return checkpoint_bytes(self.config) / self.cluster.gpus / HOST_COPY_GBS / 1e9
