"""Sampling towards a known Gaussian, whose velocity and noise are known in closed form, with pretrain/pipeline.py's schedulers.

The data is normal with mean μ and standard deviation s. Then E[x_0 | x_t] and E[ε | x_t] are linear in x_t, and the exact
solution of the sampling ODE takes each noise z to μ + s·z (nearly, for ε-prediction, whose noisiest point still holds
some data).
"""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from pretrain.diffusion import EpsilonPrediction, RectifiedFlow, sample
from pretrain.models import DiT, DiTConfig, PackedText
from pretrain.pipeline import Sampling, generate, scheduler, start_noise

MU, S = 1.5, 0.4
CPU = torch.device("cpu")
NOISE = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
TINY = DiTConfig(width=16, heads=2, depth=2, patch=2, latent_channels=4, text_width=5, mask="adaln_single")


def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """E[ε − x_0 | x_t] on the flow's path."""
    t = float(timestep) / 1000
    surprise = (x - (1 - t) * MU) / ((1 - t) ** 2 * S**2 + t**2)
    return t * surprise - (MU + (1 - t) * S**2 * surprise)


def kept(timestep: float) -> float:
    """ᾱ of DDPM's linear schedule."""
    return float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: int(timestep) + 1]))


def epsilon(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """E[ε | x_t] on DDPM's process."""
    a = kept(timestep)
    return math.sqrt(1 - a) * (x - math.sqrt(a) * MU) / (a * S**2 + 1 - a)


def draw_with(objective: str, steps: int, shift: float = 1.0) -> torch.Tensor:
    settings = Sampling(objective, steps, guidance=1.0, shift=shift)
    return sample(velocity if objective == "flow" else epsilon, NOISE, scheduler(settings, CPU))


def exact(objective: str) -> torch.Tensor:
    if objective == "flow":
        return MU + S * NOISE
    a = kept(999)
    return MU + S * (NOISE - math.sqrt(a) * MU) / math.sqrt(a * S**2 + 1 - a)


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small wait for their threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("objective", [RectifiedFlow(), EpsilonPrediction()])
def test_the_closed_forms_are_what_the_objectives_ask_for(objective):
    """Least squares over the objective's own noisy samples gives the same straight line."""
    generator = torch.Generator().manual_seed(1)
    latent, noise = MU + S * torch.randn(1, 1, 1, 200_000, generator=generator), NOISE.new_empty(1, 1, 1, 200_000)
    noise.normal_(generator=generator)
    for uniform in (0.2, 0.5, 0.9):
        given = objective.corrupt(latent, noise, torch.tensor([uniform]))
        x, y = given.noisy_BCHW.flatten().double(), given.target_BCHW.flatten().double()
        slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var()
        predict = velocity if isinstance(objective, RectifiedFlow) else epsilon
        line = predict(torch.tensor([0.0, 1.0], dtype=torch.float64), given.timestep_B[0])
        assert slope.item() == pytest.approx((line[1] - line[0]).item(), abs=0.02)
        assert (y.mean() - slope * x.mean()).item() == pytest.approx(line[0].item(), abs=0.03)


@pytest.mark.parametrize(
    ("objective", "steps", "shift"),
    [("flow", 100, 1.0), ("flow", 100, 3.0), ("epsilon", 40, 1.0)],
)
def test_samples_reach_the_targets_mean_and_std(objective, steps, shift):
    drawn = draw_with(objective, steps, shift)
    assert drawn.dtype == torch.float32
    assert drawn.shape == NOISE.shape
    assert drawn.mean().item() == pytest.approx(MU, abs=0.03)
    assert drawn.std().item() == pytest.approx(S, abs=0.03)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_converges_to_the_odes_solution(shift):
    """Euler is of the first order: twice the steps, half the error."""
    errors = [(draw_with("flow", steps, shift) - exact("flow")).abs().max().item() for steps in (50, 100, 200)]
    for coarse, fine in pairwise(errors):
        assert 1.7 < coarse / fine < 2.4


def test_dpm_solver_converges_to_the_odes_solution():
    errors = [(draw_with("epsilon", steps) - exact("epsilon")).abs().max().item() for steps in (5, 10, 20, 40)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine > 1.8
    assert errors[-1] < 0.03


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_against_a_loop_written_by_hand(shift):
    """Sigmas 1, …, 1/n, shifted, and at last 0; the backbone is asked at 1000·σ."""
    asked = []

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        asked.append(float(timestep))
        return torch.tanh(3 * x) - x * float(timestep) / 500 + 0.3

    settings = Sampling("flow", 7, guidance=1.0, shift=shift)
    got = sample(predict, NOISE, scheduler(settings, CPU))
    timesteps = list(asked)

    sigmas = [shift * s / (1 + (shift - 1) * s) for s in ((7 - i) / 7 for i in range(7))]
    x = NOISE.double()
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        x = x + (following - sigma) * predict(x, torch.tensor(1000 * sigma, dtype=torch.float64))
    assert timesteps == pytest.approx([1000 * s for s in sigmas], rel=1e-5)
    torch.testing.assert_close(got, x.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("objective", "first"), [("flow", 1000), ("epsilon", 999)])
def test_the_backbone_is_asked_once_a_step_from_noise_to_data(objective, first):
    timesteps = scheduler(Sampling(objective, 12, 1.0, 3.0), CPU).timesteps.tolist()
    assert len(timesteps) == 12
    assert timesteps[0] == first
    assert timesteps == sorted(timesteps, reverse=True)
    assert 0 < timesteps[-1] < 500


def test_bf16_predictions_are_followed_in_fp32():
    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32
        return velocity(x, timestep).bfloat16()

    drawn = sample(predict, NOISE, scheduler(Sampling("flow", 50, 1.0, 1.0), CPU))
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, draw_with("flow", 50), rtol=0, atol=0.02)


def test_start_noise_depends_on_the_seed_alone():
    batch = start_noise([3, 1, 4], (4, 6, 6))
    assert torch.equal(start_noise([4], (4, 6, 6)), batch[2:])
    assert not torch.equal(batch[0], batch[1])


def texts() -> tuple[PackedText, PackedText]:
    generator = torch.Generator().manual_seed(2)
    captions = [torch.randn(n, 5, generator=generator) for n in (3, 1, 2)]
    return PackedText.pack(captions), PackedText.pack([torch.randn(1, 5, generator=generator)])


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_generate_draws_each_picture_from_its_own_seed_and_caption(objective):
    torch.manual_seed(0)
    model = DiT(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    text, null = texts()
    settings = Sampling(objective, 4, guidance=3.0, shift=3.0)
    together = generate(model, text, null, [5, 6, 7], (6, 8), settings, keep_masks=True)
    assert together.latent_BCHW.shape == (3, 4, 6, 8)
    assert together.latent_BCHW.isfinite().all()
    assert together.masks_BSKN.shape == (3, 4, 2, 12)
    assert len(together.timesteps) == 4
    assert model.training, "generate leaves the model as it was"

    alone = generate(model, PackedText.pack([text.captions()[1]]), null, [6], (6, 8), settings, keep_masks=True)
    torch.testing.assert_close(alone.latent_BCHW, together.latent_BCHW[1:2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alone.masks_BSKN, together.masks_BSKN[1:2], rtol=1e-3, atol=1e-3)
    assert generate(model, text, null, [5, 6, 7], (6, 8), settings).masks_BSKN is None

    # The masks kept are those of the half with text: at the first step guidance has changed nothing yet.
    plain = generate(model, text, null, [5, 6, 7], (6, 8), replace(settings, guidance=1.0), keep_masks=True)
    torch.testing.assert_close(plain.masks_BSKN[:, 0], together.masks_BSKN[:, 0])
    assert not torch.allclose(plain.masks_BSKN[:, -1], together.masks_BSKN[:, -1])


def test_generate_with_a_backbone_that_predicts_0_gives_the_noise_back():
    text, null = texts()
    model = DiT(TINY)
    torch.nn.init.zeros_(model.final.proj.weight)
    drawn = generate(model, text, null, [5, 6, 7], (6, 8), Sampling("flow", 4, guidance=3.0, shift=3.0))
    assert torch.equal(drawn.latent_BCHW, start_noise([5, 6, 7], (4, 6, 8)))
