"""Training loss of a micro-batch: noise drawn, sample corrupted, prediction compared with the target.

Methods of training that a config chooses (token routing, alignment) are built here and have their part in a step's plan and loss.

Letters: B samples of a micro-batch, C latent channels, H W height and width of the latent, K blocks, N image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from data_prep.schema import Card
from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.diffusion import Loss, Objective, StepBudget, draw, kept_tokens, measure, step_budget
from pretrain.distributed.engine import Engine
from pretrain.models import DiT
from pretrain.models.alignment import Alignment, Projection
from pretrain.models.focusdit.mask import dropout_factors
from pretrain.models.routing import Routing
from pretrain.monitoring.monitor import Monitor

# The group of steps with token routing, which is refused where compute budgets make groups.
ROUTED = -1
# Added to the group of steps with alignment.
ALIGNED = 1_000_000


def model_to_train(config: Config, card: Card) -> DiT:
    """A fresh backbone, with the parameters that the run's methods need while training; `card` is the data set's."""
    backbone = config.model.backbone()
    model = DiT(backbone)
    if (alignment := config.alignment.build(backbone)) is not None:
        assert card.features is not None  # check_fits has seen to it
        model.alignment = Projection(backbone.width, alignment, card.features["width"])
    return model


@dataclass(frozen=True)
class StepPlan:
    """What one training step computes: it follows from the run's config and the step's number, on all processes alike.

    Attributes:
        routing: token routing; None in a step that computes all tokens.
        alignment: None in a step without one.
    """

    budget: StepBudget
    routing: Routing | None
    alignment: Alignment | None

    @property
    def group(self) -> int:
        """A key that steps with comparable losses and gradients share."""
        group = self.budget.group if self.routing is None else ROUTED
        return group if self.alignment is None else group + ALIGNED


class TrainingLoss:
    """The loss of a run's training steps."""

    def __init__(self, config: Config, engine: Engine, objective: Objective, monitor: Monitor):
        self.config, self.engine, self.objective, self.monitor = config, engine, objective, monitor
        self.backbone = cast(DiT, engine.module).config
        self.routing = config.routing.build(self.backbone)
        self.alignment = config.alignment.build(self.backbone)

    def plan(self, step: int) -> StepPlan:
        """The plan of step number `step`, from 0."""
        routed = self.routing is not None and step < self.routing.steps(self.config.steps)
        aligned = self.alignment is not None and step < self.alignment.steps(self.config.steps)
        budget = step_budget(self.backbone, self.objective, self.config.seed, step)
        return StepPlan(budget, self.routing if routed else None, self.alignment if aligned else None)

    def compute(self, batch: Batch, plan: StepPlan) -> Loss:
        """Computes the loss and adds it to the monitor's sums.

        All random numbers of a sample come from its own seed.
        """
        engine, backbone, step = self.engine, self.backbone, plan.budget
        routing, alignment = plan.routing, plan.alignment
        device, model = engine.world.device, cast(DiT, engine.module)
        drops = backbone.mask != "none" and backbone.mask_dropout > 0
        rows, columns = (side // backbone.patch for side in batch.mean_BCHW.shape[2:])
        tokens = rows * columns
        numbers = draw(batch.seeds, batch.mean_BCHW.shape, device, more=backbone.depth * tokens if drops else 0)
        noisy = self.objective.corrupt(
            batch.latent(numbers.posterior_BCHW), numbers.noise_BCHW, step.narrow(numbers.uniform_B)
        )
        keep_KBN = dropout_factors(numbers.more_uniform_BX, backbone.depth, backbone.mask_dropout) if drops else None
        route = judged_BHW = None
        if routing is not None:
            route = routing.route(kept_tokens(batch.seeds, tokens, routing.kept(tokens), device))
            judged_BHW = routing.judged(route, (rows, columns), backbone.patch)
        latent_BCHW = noisy.noisy_BCHW.to(engine.dtype)
        conditioning = model.condition(noisy.timestep_B, batch.text)
        with self.monitor.forward():
            prediction = engine.forward(
                latent_BCHW, conditioning, None, keep_KBN, step.budget, route, alignment is not None
            )
        loss = measure(prediction.sample_BCHW, noisy, judged_BHW)
        if alignment is not None:
            assert batch.features_BhwF is not None
            aligned = alignment.loss(prediction.aligned_BnF, batch.features_BhwF, backbone.patch, route)
            loss = replace(loss, alignment=aligned, alignment_weight=alignment.weight)
        masks_3KB = prediction.mask_statistics_3KB(backbone.mask_dropout if drops else 0.0)
        self.monitor.record(batch, loss, masks_3KB, step.budget, routing, alignment)
        return loss
