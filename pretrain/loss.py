"""Training loss of a micro-batch: noise drawn, sample corrupted, prediction compared with the target.

Letters: B samples of a micro-batch, C latent channels, H W height and width of the latent, K blocks, N image tokens.
"""

from __future__ import annotations

from typing import cast

from pretrain.data.batch import Batch
from pretrain.diffusion import Loss, Objective, StepBudget, draw, measure
from pretrain.distributed.engine import Engine
from pretrain.models import DiT
from pretrain.models.focusdit.mask import dropout_factors
from pretrain.monitoring.monitor import Monitor


def forward(engine: Engine, objective: Objective, monitor: Monitor, batch: Batch, step: StepBudget) -> Loss:
    """Computes the loss and adds it to the monitor's sums.

    All random numbers of a sample come from its own seed; the step's compute budget from the run's seed and its number.
    """
    device, model = engine.world.device, cast(DiT, engine.module)
    backbone = model.config
    drops = backbone.mask != "none" and backbone.mask_dropout > 0
    tokens = batch.mean_BCHW[0, 0].numel() // backbone.patch**2
    numbers = draw(batch.seeds, batch.mean_BCHW.shape, device, more=backbone.depth * tokens if drops else 0)
    noisy = objective.corrupt(batch.latent(numbers.posterior_BCHW), numbers.noise_BCHW, step.narrow(numbers.uniform_B))
    keep_KBN = dropout_factors(numbers.more_uniform_BX, backbone.depth, backbone.mask_dropout) if drops else None
    latent_BCHW = noisy.noisy_BCHW.to(engine.dtype)
    conditioning = model.condition(noisy.timestep_B, batch.text)
    prediction = engine.forward(latent_BCHW, conditioning, None, keep_KBN, step.budget)
    loss = measure(prediction.sample_BCHW, noisy)
    monitor.record(batch, loss, prediction.masks_KBN, step.budget)
    return loss
