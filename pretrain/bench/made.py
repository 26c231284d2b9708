"""A training with all its parts but the data: its micro-batches are made."""

from __future__ import annotations

from typing import Any, cast

import torch

from data_prep.encoders import DOWNSAMPLE
from pretrain import training
from pretrain.checkpoint.writer import CheckpointWriter
from pretrain.compilation import compile_for_training
from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.distributed import optimizer as optim
from pretrain.distributed.ema import Ema
from pretrain.distributed.engine import Engine
from pretrain.distributed.world import World
from pretrain.loss import TrainingLoss
from pretrain.models import DiT, PackedText
from pretrain.models.text import TEXT_MULTIPLE
from pretrain.monitoring.monitor import Monitor
from pretrain.resilience.signals import StopRequest
from pretrain.resilience.spike_guard import SpikeGuard
from pretrain.resilience.watchdog import Watchdog


def made_trainer(config: Config, deepspeed: dict[str, Any], world: World, stop: StopRequest) -> training.Trainer:
    """A trainer without loader, preview, validation and recovery; its watchdog is started, and is to be closed by the caller."""
    backbone = config.model.backbone()
    torch.manual_seed(config.seed)
    model = DiT(backbone).to(world.device)
    model.recompute = config.model.recompute
    if config.model.compile:
        compile_for_training(model)
    zero = Engine(model, optim.build_optimizer(model, config.optimizer), deepspeed, world, model.reused_parameters)
    ema, guard = Ema(zero, config.optimizer), SpikeGuard(config.guard, world, stop)
    monitor = Monitor(config, backbone, zero)
    monitor.resume(0, [])
    saver = CheckpointWriter(config, zero, ema, {})
    loss = TrainingLoss(config, zero, config.objective.build(), monitor)
    watchdog = Watchdog(world, config.guard.seconds).start()
    nothing = cast(Any, None)
    parts: Any = (
        config,
        {},
        nothing,
        model,
        zero,
        ema,
        loss,
        guard,
        watchdog,
        monitor,
        nothing,
        nothing,
        saver,
        nothing,
    )
    return training.Trainer(*parts)


def made_batch(config: Config, lengths: list[int]) -> Batch:
    """A micro-batch of random latents, one for each caption's number of tokens; in host memory, as a loader gives it."""
    backbone, images, side = config.model.backbone(), len(lengths), config.data.resolution // DOWNSAMPLE
    latent = torch.randn(images, backbone.latent_channels, side, side).half()
    captions = [torch.randn(n, backbone.text_width).half() for n in lengths]
    text = PackedText.pack(captions, TEXT_MULTIPLE if config.model.compile else None)
    return Batch(tuple(map(str, range(images))), tuple(range(images)), text, latent, None)
