"""A micro-batch's loss against the formula, with a prediction that is known; token routing and alignment by the step's number."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbones import build
from torch import Tensor

from pretrain.config import Config, load
from pretrain.data.batch import Batch
from pretrain.diffusion import RectifiedFlow, draw
from pretrain.loss import TrainingLoss
from pretrain.models import DiT, DiTConfig, PackedText, preset
from pretrain.models.alignment import Alignment, Projection
from pretrain.models.routing import Routing

SEEDS = (3, 2**50)
SMALL = replace(preset("focusdit_tiny"), width=32, heads=2, depth=4, text_width=5, mask_hidden=(8, 4))


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    mean, std = torch.randn(2, 4, 16, 16), torch.rand(2, 4, 16, 16)
    return Batch(("a", "b"), SEEDS, PackedText.pack([torch.randn(3, 5), torch.randn(2, 5)]), mean, std)


def made(
    backbone: DiTConfig, module: Any, forward: Any, *words: str, recorded: list[Any] | None = None
) -> TrainingLoss:
    """The loss of a run of 10 steps over a backbone without an engine's machinery."""
    config: Config = load("demo_256", ["data.path=/set", "steps=10", "optimizer.warmup_steps=0", *words])[0]
    world = SimpleNamespace(device=torch.device("cpu"))
    engine: Any = SimpleNamespace(world=world, dtype=torch.float32, module=module, forward=forward)
    kept = [] if recorded is None else recorded
    monitor: Any = SimpleNamespace(record=lambda *parts: kept.append(parts), forward=nullcontext)
    return TrainingLoss(config, engine, RectifiedFlow(), monitor)


def test_the_loss_is_the_mean_squared_velocity_where_the_prediction_is_zero(batch: Batch) -> None:
    """velocity = noise − latent, latent a sample of the posterior; both from the samples' own seeds."""
    recorded: list[Any] = []
    given: list[torch.Tensor] = []

    def predict(latent_BCHW: torch.Tensor, conditioning: torch.Tensor, *_: Any) -> Any:
        given.extend([latent_BCHW, conditioning])
        return SimpleNamespace(sample_BCHW=torch.zeros_like(latent_BCHW), mask_statistics_3KB=lambda dropout: None)

    backbone = preset("dit_tiny")
    module = SimpleNamespace(config=backbone, condition=lambda timestep_B, text: timestep_B)
    training_loss = made(backbone, module, predict, recorded=recorded)
    loss = training_loss.compute(batch, training_loss.plan(0))

    numbers = draw(SEEDS, batch.mean_BCHW.shape, torch.device("cpu"))
    assert batch.std_BCHW is not None
    latent = batch.mean_BCHW + batch.std_BCHW * numbers.posterior_BCHW
    squares = (numbers.noise_BCHW - latent).square()
    torch.testing.assert_close(loss.per_sample_B, squares.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(loss.mean, squares.mean())
    t = (given[1] / 1000)[:, None, None, None]
    torch.testing.assert_close(given[0], (1 - t) * latent + t * numbers.noise_BCHW)
    assert recorded[0][:2] == (batch, loss)


# ---- token routing ----


def step(model: DiT, batch: Batch, number: int, *words: str) -> tuple[Tensor, list[Tensor], list[Any]]:
    """What a step minimises, the model's gradients, and what the monitor was told of routing and alignment."""
    recorded: list[Any] = []
    training_loss = made(model.config, model, model, *words, recorded=recorded)
    loss = training_loss.compute(batch, training_loss.plan(number)).total
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.detach(), [g for g in gradients if g is not None], recorded[0][-2:]


@pytest.mark.parametrize(
    ("name", "settings", "fusion"),
    [
        ("tread", ["routing.first=1", "routing.last=3"], None),
        ("sprint", ["model.fusion=[2,6]"], (1, 3)),
        ("deferred_masking", ["routing.first=1"], None),
    ],
)
def test_end_points_are_the_plain_step_to_the_bit(
    name: str, settings: list[str], fusion: tuple[int, int] | None, batch: Batch
) -> None:
    """No token left out, no routed step, or a step after `until`."""
    model, words = (
        build(replace(SMALL, fusion=fusion)),
        [f"routing.name={name}", "model.preset=dit_tiny_deep", *settings],
    )
    loss, gradients, _ = step(model, batch, 7)
    for number, change in ((7, "share=0"), (7, "until=0"), (7, "until=0.7")):
        same, others, told = step(model, batch, number, *words, f"routing.{change}")
        assert torch.equal(same, loss) and told == (None, None)
        assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
    routed, others, told = step(model, batch, 6, *words, "routing.until=0.7")
    assert (routed - loss).abs() > 1e-4 * loss
    assert told == (Routing(name, 0.5, 1, 4 if name == "deferred_masking" else 3, 0.7), None)


def test_a_samples_kept_tokens_do_not_depend_on_its_batch(batch: Batch) -> None:
    """So that the number of processes and the micro-batch's size change nothing."""
    model, words = (
        build(SMALL),
        ["routing.name=tread", "routing.first=1", "routing.last=3", "model.preset=dit_tiny_deep"],
    )
    training_loss = made(SMALL, model, model, *words)
    whole = training_loss.compute(batch, training_loss.plan(0)).per_sample_B
    assert batch.std_BCHW is not None
    for b in range(2):
        text = PackedText.pack([batch.text.captions()[b]])
        alone = Batch(batch.keys[b : b + 1], SEEDS[b : b + 1], text, batch.mean_BCHW[[b]], batch.std_BCHW[[b]])
        torch.testing.assert_close(training_loss.compute(alone, training_loss.plan(0)).per_sample_B, whole[[b]])


def test_routed_steps_are_compared_among_each_other_alone() -> None:
    """The spike guard's group of a step; without routing the group is what it was."""
    model, words = build(SMALL), ["routing.name=tread", "routing.until=0.3", "model.preset=dit_tiny_deep"]
    routed, plain = made(SMALL, model, model, *words), made(SMALL, model, model)
    assert [routed.plan(number).group for number in range(5)] == [-1, -1, -1, 0, 0]
    assert {plain.plan(number).group for number in range(5)} == {0}


# ---- alignment ----

ALIGNED = ("alignment.weight=0.5", "alignment.block=1", "alignment.until=0.7", "model.preset=dit_tiny_deep")


def with_projection(batch: Batch) -> tuple[DiT, Batch]:
    """A model and a batch with features of the width 7; the tokens are of 4 × 4 latent pixels."""
    model = build(SMALL)
    model.alignment = Projection(32, Alignment(0.5, 1, 16, 0.7), 7)
    return model, replace(batch, features_BhwF=torch.randn(2, 8, 8, 7).half())


def test_alignment_is_added_with_its_weight_and_ends_after_until(batch: Batch) -> None:
    """Without it, a step is the plain one to the bit: by the weight 0, or after `until`; with it all other numbers are."""
    model, batch = with_projection(batch)
    plain, gradients, _ = step(model, batch, 6)
    for number, words in ((7, ALIGNED), (6, (*ALIGNED, "alignment.weight=0"))):
        same, others, told = step(model, batch, number, *words)
        assert torch.equal(same, step(model, batch, number)[0]) and told == (None, None)
        assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
    training_loss = made(SMALL, model, model, *ALIGNED)
    loss = training_loss.compute(batch, training_loss.plan(6))
    assert torch.equal(loss.mean, plain) and loss.alignment is not None
    assert torch.equal(loss.total, plain + 0.5 * loss.alignment)
    assert -1 < loss.alignment < 1
    aligned, others, told = step(model, batch, 6, *ALIGNED)
    assert torch.equal(aligned, loss.total) and told == (None, Alignment(0.5, 1, 2048, 0.7))
    assert len(others) == len(gradients) + 6  # the projection's


def test_aligned_steps_are_compared_among_each_other_alone() -> None:
    model = build(SMALL)
    aligned = made(SMALL, model, model, *ALIGNED)
    both = made(SMALL, model, model, *ALIGNED, "routing.name=tread", "routing.until=0.3", "routing.first=1")
    groups = [[loss.plan(number).group for number in (0, 3, 7)] for loss in (aligned, both)]
    assert groups[0][0] == groups[0][1] == groups[1][1] and groups[0][2] == groups[1][2] == 0
    assert len({groups[1][0], groups[0][0], 0, -1}) == 4
