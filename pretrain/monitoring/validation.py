"""Validation while training: the loss of held-out samples, each at a noise level and with noise of its own, fixed for ever.

It is the protocol of MLPerf's FLUX.1 benchmark: eight noise levels, 0 to 7/8, each for an eighth of the samples.

The same weights give the same figures whatever the number of processes: each sample's loss is computed in a batch that does
not depend on them (`pretrain/data/validation_set.py`), and all losses are added up in fp64 in the samples' order. Nothing of the
training changes: no random state is used, blocks compute in eager mode, and the weights are put back as they were.

Letters: A the weights and their averages, L noise levels, n samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.compilation import eager_mode
from pretrain.config import VALIDATION_LEVELS, Config
from pretrain.data.loader import Loader
from pretrain.data.validation_set import ValidationBatch
from pretrain.diffusion import Objective, draw, measure
from pretrain.distributed.ema import Ema
from pretrain.distributed.engine import Engine
from pretrain.distributed.world import all_reduce
from pretrain.models import DiT
from pretrain.models.budget_choices import default_budget
from pretrain.monitoring.expert_use import ExpertUse
from pretrain.monitoring.monitor import Monitor


class Validation:
    """Validates the weights and their averages every `logging.validate_every` steps, if `data.validation` holds samples out.

    Args:
        begin: notes what the process does, for the watchdog.
        stopping: whether this process was asked to stop.
    """

    def __init__(
        self,
        config: Config,
        loader: Loader,
        objective: Objective,
        begin: Callable[[str], None],
        stopping: Callable[[], bool],
    ):
        self.config, self.objective, self.begin, self.stopping = config, objective, begin, stopping
        self.batches = loader.validation_batches()

    def due(self, step: int) -> bool:
        """True where a validation follows step number `step`; 0 is before the first one."""
        if self.config.data.validation is None:
            return False
        return step % self.config.logging.validate_every == 0 or step == self.config.steps

    def run(self, engine: Engine, model: DiT, ema: Ema, monitor: Monitor, step: int) -> None:
        """Writes the losses, outside of the training's speed; a request to stop breaks it off. All processes call it."""
        start = time.perf_counter()
        was_training, use = model.training, ExpertUse(model)
        with monitor.paused(), eager_mode(self.config.model.compile):
            model.eval()
            try:
                with use.measured():
                    losses = [self._losses(engine, model, "weights")]
                for name in ema.partitions:
                    with ema.applied(name):
                        losses.append(self._losses(engine, model, f"average {name}"))
            finally:
                model.train(was_training)
            sums = all_reduce(torch.stack(losses).to(engine.world.device), engine.world).cpu()
            shares = use.scalars(engine.world)
        if engine.world.rank != 0:
            return
        where = f"step {step}/{self.config.steps}  validation"
        losses_An, unfinished = sums.split([self.config.data.validation_samples, 1], dim=1)
        if unfinished.any():
            print(f"{where} broken off, as the run was asked to stop", flush=True)
            return
        weights, *averages = (by_level(loss_n) for loss_n in losses_An)
        points, words = curves("validation", weights), []
        for name, average in zip(ema.partitions, averages, strict=True):
            points |= curves(f"validation_{name}", average)
            words.append(f"of {name} {average.mean():.4f}")
        monitor.scalars(points | shares, step)
        print(
            f"{where} loss {weights.mean():.4f}, {', '.join(words)}  "
            f"({losses_An.shape[1]} samples, {time.perf_counter() - start:.1f} s)",
            flush=True,
        )

    def _losses(self, engine: Engine, model: DiT, what: str) -> Tensor:
        """The losses of this process's samples in their places, 0 in the others', and 1 at the end if it was broken off."""
        losses = torch.zeros(self.config.data.validation_samples + 1, dtype=torch.float64)
        for i, held_out in enumerate(self.batches):
            if self.stopping():
                losses[-1] = 1
                break
            self.begin(f"validating the {what}, batch {i + 1} of {len(self.batches)}")
            losses[list(held_out.numbers)] = validation_loss(engine, model, self.objective, held_out).double().cpu()
        return losses


@torch.no_grad()
def validation_loss(engine: Engine, model: DiT, objective: Objective, held_out: ValidationBatch) -> Tensor:
    """Each sample's loss [B] at the batch's noise level, with the compute budget that sampling has there."""
    device = engine.world.device
    batch = held_out.batch.to(device, engine.dtype)
    numbers = draw(batch.seeds, batch.mean_BCHW.shape, device)
    t_B = torch.full((len(batch.keys),), held_out.t, device=device)
    noisy = objective.at(batch.latent(numbers.posterior_BCHW), numbers.noise_BCHW, t_B)
    conditioning = model.condition(noisy.timestep_B, batch.text)
    budget = default_budget(model.config, held_out.t)
    prediction = model(noisy.noisy_BCHW.to(engine.dtype), conditioning, None, None, budget)
    return measure(prediction.sample_BCHW, noisy).per_sample_B


def by_level(loss_n: Tensor) -> Tensor:
    """Mean losses [L] by noise level; sample k has level k mod L, so each has as many samples."""
    return loss_n.view(-1, VALIDATION_LEVELS).mean(0)


def curves(name: str, loss_L: Tensor) -> dict[str, float]:
    """The curves' points: `NAME/loss`, and `NAME/loss_t0.125` by noise level."""
    levels = {f"{name}/loss_t{i / VALIDATION_LEVELS:.3f}": loss.item() for i, loss in enumerate(loss_L)}
    return {f"{name}/loss": loss_L.mean().item(), **levels}
