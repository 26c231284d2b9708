"""Training loss of a micro-batch: noise drawn, sample corrupted, prediction compared with the target.

Letters: B samples of a micro-batch, C latent channels, H W height and width of the latent, K blocks, N image tokens.
"""

from __future__ import annotations

from typing import cast

from pretrain.data.loader import Batch
from pretrain.diffusion import Loss, Objective, draw, measure
from pretrain.diffusion.step_budget import StepEffort
from pretrain.distributed.engine import Engine
from pretrain.models import DiT
from pretrain.models.focusdit.mask import draw_keep
from pretrain.monitoring.monitor import Monitor


def forward(engine: Engine, objective: Objective, monitor: Monitor, batch: Batch, spent: StepEffort) -> Loss:
    """Computes the loss and adds it to the monitor's sums.

    All random numbers of a sample come from its own seed; what a step may spend comes from the run's seed and the step's
    number.
    """
    device, backbone = engine.world.device, cast(DiT, engine.module).config
    numbers = draw(batch.seeds, batch.mean_BCHW.shape, device)
    noisy = objective.corrupt(batch.latent(numbers.posterior_BCHW), numbers.noise_BCHW, spent.narrow(numbers.uniform_B))
    keep_KBN = None
    if backbone.mask != "none" and backbone.mask_dropout:
        tokens = noisy.noisy_BCHW[0, 0].numel() // backbone.patch**2
        keep_KBN = draw_keep(batch.seeds, backbone.depth, tokens, backbone.mask_dropout, device)
    latent_BCHW = noisy.noisy_BCHW.to(engine.dtype)
    prediction = engine.forward(latent_BCHW, noisy.timestep_B, batch.text, None, keep_KBN, spent.effort)
    loss = measure(prediction.sample_BCHW, noisy)
    monitor.record(batch, loss, prediction.masks_KBN, spent.effort)
    return loss
