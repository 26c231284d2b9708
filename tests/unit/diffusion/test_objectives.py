"""Both objectives at their end points and against diffusers."""

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from diffusers import DDPMScheduler

from pretrain.diffusion import EpsilonPrediction, NoisySample, Objective, RectifiedFlow, measure


def pair(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latent, noise = torch.randn(2, images, 3, 4, 5, generator=generator)
    return latent, noise


def test_flow_begins_at_the_data():
    latent, noise = pair(2)
    start = RectifiedFlow(mean=-60.0).corrupt(latent, noise, torch.tensor([0.3, 0.7]))
    torch.testing.assert_close(start.noisy_BCHW, latent, rtol=0, atol=0)
    torch.testing.assert_close(start.timestep_B, torch.zeros(2), rtol=0, atol=1e-12)
    assert torch.equal(start.target_BCHW, noise - latent)


def test_flow_ends_in_the_noise():
    latent, noise = pair(2)
    end = RectifiedFlow(mean=60.0).corrupt(latent, noise, torch.tensor([0.3, 0.7]))
    torch.testing.assert_close(end.noisy_BCHW, noise, rtol=0, atol=0)
    assert torch.equal(end.timestep_B, torch.full((2,), 1000.0))
    assert torch.equal(end.target_BCHW, noise - latent)


def test_flow_is_a_straight_path_with_the_target_as_its_velocity():
    """Following the target from x_t for −t leads to the data, for 1 − t to the noise."""
    latent, noise = pair(5)
    sample = RectifiedFlow().corrupt(latent, noise, torch.tensor([0.02, 0.3, 0.5, 0.8, 0.99]))
    t = (sample.timestep_B / 1000)[:, None, None, None]
    torch.testing.assert_close(sample.noisy_BCHW - t * sample.target_BCHW, latent)
    torch.testing.assert_close(sample.noisy_BCHW + (1 - t) * sample.target_BCHW, noise)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.6, 1.4)])
def test_flow_times_are_logit_normal(mean, std):
    quantiles = [1e-4, 0.1, 0.25, 0.5, 0.9, 0.999]
    expected = [1000 / (1 + math.exp(-NormalDist(mean, std).inv_cdf(q))) for q in quantiles]
    got = RectifiedFlow(mean, std).corrupt(*pair(6), torch.tensor(quantiles, dtype=torch.float64)).timestep_B
    torch.testing.assert_close(got, torch.tensor(expected))
    if mean == 0:
        assert got[3] == 500


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_flow_shift(shift):
    """t ← s·t / (1 + (s − 1)·t): the odds of noise against data are multiplied by s."""
    uniform = torch.tensor([0.01, 0.4, 0.5, 0.95])
    plain = RectifiedFlow().corrupt(*pair(4), uniform).timestep_B / 1000
    sample = RectifiedFlow(shift=shift).corrupt(*pair(4), uniform)
    shifted = sample.timestep_B / 1000
    torch.testing.assert_close(shifted / (1 - shifted), shift * plain / (1 - plain), rtol=1e-4, atol=0)
    assert ((shifted > plain) == (shift > 1)).all()
    t, (latent, noise) = shifted[:, None, None, None], pair(4)
    torch.testing.assert_close(sample.noisy_BCHW, (1 - t) * latent + t * noise)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_uniform_flow_times(shift):
    """t is the uniform number, then shifted; mean and std do not matter."""
    uniform = torch.tensor([0.01, 0.25, 0.5, 0.95])
    sample = RectifiedFlow(mean=2.0, std=3.0, shift=shift, times="uniform").corrupt(*pair(4), uniform)
    torch.testing.assert_close(sample.timestep_B, 1000 * shift * uniform / (1 + (shift - 1) * uniform))


def times_of(objective: Objective, uniform: torch.Tensor) -> torch.Tensor:
    """The times in 0..1 that uniform numbers choose."""
    empty = torch.zeros(len(uniform), 1, 1, 1)
    return objective.corrupt(empty, empty, uniform).timestep_B.double() / 1000


OBJECTIVES = [
    RectifiedFlow(),
    RectifiedFlow(mean=-0.6, std=1.4, shift=5.0),
    RectifiedFlow(mean=0.5, std=0.7, shift=0.5),
    RectifiedFlow(times="uniform"),
    RectifiedFlow(shift=3.0, times="uniform"),
    EpsilonPrediction(),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_share_of_times_is_the_inverse_of_how_they_are_chosen(objective):
    times = torch.tensor([0.03125, 0.125, 0.25, 0.5, 0.75, 0.875, 0.96875], dtype=torch.float64)
    shares = [objective.cdf(float(t)) for t in times]
    assert shares == sorted(set(shares))
    assert [objective.cdf(t) for t in (-1.0, 0.0, 1.0, 2.0)] == [0, 0, 1, 1]
    drawn = times_of(objective, torch.tensor(shares, dtype=torch.float64))
    step = 1e-3 if isinstance(objective, EpsilonPrediction) else 0
    assert ((drawn <= times + 1e-6) & (drawn > times - step - 1e-6)).all()
    if isinstance(objective, EpsilonPrediction):
        assert shares == times.tolist()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_times_drawn_bin_by_bin_lie_as_those_drawn_at_once(objective):
    """Each bin holds the share of the times that cdf says, and its own draws have the quantiles of those."""
    quantiles = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    whole = times_of(objective, quantiles)
    edges = [0.0, 0.2, 0.25, 0.7, 1.0]
    for low, high in pairwise(edges):
        start, end = objective.cdf(low), objective.cdf(high)
        inside = whole[(whole >= low) & (whole < high)]
        assert len(inside) / len(whole) == pytest.approx(end - start, abs=2e-4)
        evenly = (torch.arange(len(inside), dtype=torch.float64) + 0.5) / len(inside)
        binned = times_of(objective, start + evenly * (end - start))
        assert ((binned >= low - 1e-6) & (binned <= high + 1e-6)).all()
        torch.testing.assert_close(binned, inside, rtol=0, atol=2e-3)


@pytest.mark.parametrize("objective", [RectifiedFlow(), RectifiedFlow(times="uniform"), EpsilonPrediction()])
def test_the_uniform_numbers_ends_are_harmless(objective):
    sample = objective.corrupt(*pair(2), torch.tensor([0.0, 1.0]))
    assert sample.noisy_BCHW.isfinite().all()
    assert 0 <= sample.timestep_B[0] < 10
    assert 990 < sample.timestep_B[1] <= 1000


def test_epsilon_end_points():
    latent, noise = pair(2)
    sample = EpsilonPrediction().corrupt(latent, noise, torch.tensor([0.0, 0.9999]))
    assert sample.timestep_B.tolist() == [0, 999]
    torch.testing.assert_close(sample.noisy_BCHW[0], math.sqrt(1 - 1e-4) * latent[0] + 0.01 * noise[0])
    torch.testing.assert_close(sample.noisy_BCHW[1], noise[1], rtol=0, atol=0.03)
    assert torch.equal(sample.target_BCHW, noise)


def test_epsilon_against_diffusers():
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    t = torch.tensor([0, 1, 7, 250, 500, 777, 998, 999])
    latent, noise = pair(len(t))
    sample = EpsilonPrediction().corrupt(latent, noise, (t + 0.5) / 1000)
    assert torch.equal(sample.timestep_B, t.float())
    torch.testing.assert_close(sample.noisy_BCHW, scheduler.add_noise(latent, noise, t), rtol=1e-4, atol=1e-5)


def test_epsilon_draws_all_timesteps_alike():
    uniform = (torch.arange(5000) + 0.5) / 5000
    empty = torch.zeros(5000, 1, 1, 1)
    drawn = EpsilonPrediction().corrupt(empty, empty, uniform).timestep_B
    assert torch.equal(drawn, torch.arange(1000.0).repeat_interleave(5))


def test_the_measured_loss():
    latent, noise = pair(4)
    sample = NoisySample(latent, timestep_B=torch.arange(4.0), target_BCHW=noise)
    prediction = (noise + torch.arange(4.0)[:, None, None, None]).requires_grad_()
    loss = measure(prediction, sample)
    torch.testing.assert_close(loss.per_sample_B, torch.tensor([0.0, 1.0, 4.0, 9.0]))
    assert loss.mean.item() == pytest.approx(3.5)
    assert torch.equal(loss.timestep_B, sample.timestep_B)
    assert not loss.per_sample_B.requires_grad
    loss.mean.backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction.detach() - noise) / prediction.numel())


def test_the_loss_of_a_bf16_prediction_is_measured_in_fp32():
    latent, noise = pair(4)
    prediction = noise.bfloat16()
    loss = measure(prediction, NoisySample(latent, torch.zeros(4), noise))
    assert loss.mean.dtype == torch.float32
    torch.testing.assert_close(loss.mean, (prediction.float() - noise).square().mean(), rtol=1e-5, atol=0)
