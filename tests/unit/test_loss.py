"""A micro-batch's loss against the formula, with a prediction that is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.diffusion import RectifiedFlow, draw, step_budget
from pretrain.loss import forward
from pretrain.models import PackedText, preset

SEEDS = (3, 2**50)


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    mean, std = torch.randn(2, 4, 8, 8), torch.rand(2, 4, 8, 8)
    return Batch(("a", "b"), SEEDS, PackedText.pack([torch.randn(3, 5), torch.randn(2, 5)]), mean, std)


def test_the_loss_is_the_mean_squared_velocity_where_the_prediction_is_zero(batch: Batch) -> None:
    """velocity = noise − latent, latent a sample of the posterior; both from the samples' own seeds."""
    recorded: list[Any] = []
    given: list[torch.Tensor] = []

    def predict(latent_BCHW: torch.Tensor, conditioning: torch.Tensor, *_: Any) -> Any:
        given.extend([latent_BCHW, conditioning])
        return SimpleNamespace(sample_BCHW=torch.zeros_like(latent_BCHW), masks_KBN=None)

    backbone = preset("dit_tiny")
    world = SimpleNamespace(device=torch.device("cpu"))
    engine: Any = SimpleNamespace(
        world=world,
        dtype=torch.float32,
        module=SimpleNamespace(config=backbone, condition=lambda timestep_B, text: timestep_B),
        forward=predict,
    )
    monitor: Any = SimpleNamespace(record=lambda *parts: recorded.append(parts))
    objective = RectifiedFlow()
    loss = forward(engine, objective, monitor, batch, step_budget(backbone, objective, seed=0, step=0))

    numbers = draw(SEEDS, batch.mean_BCHW.shape, torch.device("cpu"))
    assert batch.std_BCHW is not None
    latent = batch.mean_BCHW + batch.std_BCHW * numbers.posterior_BCHW
    squares = (numbers.noise_BCHW - latent).square()
    torch.testing.assert_close(loss.per_sample_B, squares.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(loss.mean, squares.mean())
    t = (given[1] / 1000)[:, None, None, None]
    torch.testing.assert_close(given[0], (1 - t) * latent + t * numbers.noise_BCHW)
    assert recorded[0][:2] == (batch, loss)
