"""Sampling towards a known Gaussian, whose velocity and noise are known in closed form, with pretrain/schedulers.py.

The data is normal with mean μ and standard deviation s. Then E[x_0 | x_t] and E[ε | x_t] are linear in x_t, and the exact
solution of the sampling ODE takes each noise z to μ + s·z (nearly, for ε-prediction, whose noisiest point still holds
some data).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import backbones
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.diffusion import (
    BudgetRule,
    EpsilonPrediction,
    Guidance,
    RectifiedFlow,
    choose_rule,
    generate,
    sample,
    start_noise,
    switching,
)
from pretrain.diffusion.switching import change
from pretrain.models import CachedConditioning, ComputeBudget, DiT, DiTConfig, PackedText, Prediction, Skip
from pretrain.models.mixers.mediators import MediatorsSection
from pretrain.schedulers import build_scheduler, set_timesteps

pytestmark = pytest.mark.usefixtures("one_thread")

MU, S = 1.5, 0.4
CPU = torch.device("cpu")
NOISE = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
TINY = DiTConfig(width=16, heads=2, depth=2, patch=2, latent_channels=4, text_width=5, mask="adaln_single")


def velocity(x: torch.Tensor, timestep: torch.Tensor, t: float) -> torch.Tensor:
    """E[ε − x_0 | x_t] on the flow's path."""
    surprise = (x - (1 - t) * MU) / ((1 - t) ** 2 * S**2 + t**2)
    return t * surprise - (MU + (1 - t) * S**2 * surprise)


def kept(timestep: float) -> float:
    """ᾱ of DDPM's linear schedule."""
    return float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: int(timestep) + 1]))


def epsilon(x: torch.Tensor, timestep: torch.Tensor, t: float) -> torch.Tensor:
    """E[ε | x_t] on DDPM's process."""
    a = kept(timestep)
    return math.sqrt(1 - a) * (x - math.sqrt(a) * MU) / (a * S**2 + 1 - a)


def scheduled(objective: str, steps: int, shift: float = 1.0, sampler: str = "ode") -> Any:
    """The objective's scheduler with its timesteps set."""
    scheduler = build_scheduler(objective, shift, sampler)
    set_timesteps(scheduler, steps, CPU)
    return scheduler


def draw_with(objective: str, steps: int, shift: float = 1.0) -> torch.Tensor:
    return sample(velocity if objective == "flow" else epsilon, NOISE, scheduled(objective, steps, shift))


def exact(objective: str) -> torch.Tensor:
    if objective == "flow":
        return MU + S * NOISE
    a = kept(999)
    return MU + S * (NOISE - math.sqrt(a) * MU) / math.sqrt(a * S**2 + 1 - a)


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
        timestep = given.timestep_B[0]
        line = predict(torch.tensor([0.0, 1.0], dtype=torch.float64), timestep, float(timestep) / 1000)
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


def draw_by_sde(steps: int, shift: float = 1.0, pictures: Sequence[int] = range(8)) -> torch.Tensor:
    """Some of the eight pictures, each step's noise from a generator of each."""
    generators = [torch.Generator().manual_seed(i) for i in pictures]
    return sample(velocity, NOISE[list(pictures)], scheduled("flow", steps, shift, "sde"), generator=generators)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_sde_reaches_the_targets_mean_and_std(shift):
    """A drift without its half, of the other sign, or noise of half or twice the variance miss one of them by 0.08 and more."""
    drawn = torch.cat([draw_by_sde(400, shift, range(i, i + 4)) for i in (0, 4)])
    assert drawn.mean().item() == pytest.approx(MU, abs=0.015)
    assert drawn.std().item() == pytest.approx(S, abs=0.015)


def test_the_sde_forgets_the_noise_it_started_from():
    """Along the ODE the sample is a function of the starting noise; along the SDE noise of each step takes its place."""
    ode, sde = draw_with("flow", 100), draw_by_sde(100)
    start = NOISE.flatten()
    assert torch.corrcoef(torch.stack([start, ode.flatten()]))[0, 1] > 0.999
    assert 0.2 < torch.corrcoef(torch.stack([start, sde.flatten()]))[0, 1] < 0.9


def test_the_sde_against_a_loop_written_by_hand():
    """The score of the closed form, and all steps but the last with noise."""
    generator = torch.Generator().manual_seed(3)
    got = sample(velocity, NOISE, scheduled("flow", 7, 3.0, "sde"), generator=generator)

    generator.manual_seed(3)
    times = [3 * t / (1 + 2 * t) for t in ((7 - i) / 7 for i in range(8))]
    x = NOISE.double()
    for t, following in pairwise(times):
        v = velocity(x, torch.tensor(1000 * t), t)
        if following > 0:
            score = -(x - (1 - t) * MU) / ((1 - t) ** 2 * S**2 + t**2)  # of N((1 − t)·μ, (1 − t)²·s² + t²)
            x = x + (v - t / 2 * score) * (following - t)
            x = x + math.sqrt(t * (t - following)) * torch.randn(NOISE.shape, generator=generator)
        else:
            x = x - t * v
    torch.testing.assert_close(got, x.float(), rtol=1e-4, atol=1e-4)


def test_the_sdes_pictures_follow_from_their_seeds_alone():
    whole = draw_by_sde(5)
    assert torch.equal(draw_by_sde(5), whole)
    torch.testing.assert_close(torch.cat([draw_by_sde(5, pictures=[i]) for i in range(8)]), whole)
    torch.testing.assert_close(draw_by_sde(5, pictures=[6, 1, 3]), whole[[6, 1, 3]])


def test_one_step_of_the_sde_is_the_odes():
    assert torch.equal(draw_by_sde(1), draw_with("flow", 1))


def test_samplers_that_are_not_there():
    with pytest.raises(ValueError, match=r"sampler sde: .* the epsilon objective has none; take ode"):
        build_scheduler("epsilon", 1.0, "sde")
    with pytest.raises(ValueError, match=r"sampler 'heun' is none of ode, sde"):
        build_scheduler("flow", 1.0, "heun")


def test_dpm_solver_converges_to_the_odes_solution():
    errors = [(draw_with("epsilon", steps) - exact("epsilon")).abs().max().item() for steps in (5, 10, 20, 40)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine > 1.8
    assert errors[-1] < 0.03


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_against_a_loop_written_by_hand(shift):
    """Sigmas 1, …, 1/n, shifted, and at last 0; the backbone is asked at 1000·σ, and told σ on the host."""
    asked = []

    def predict(x: torch.Tensor, timestep: torch.Tensor, t: float) -> torch.Tensor:
        asked.append(float(timestep))
        assert isinstance(t, float) and t == pytest.approx(float(timestep) / 1000)
        return torch.tanh(3 * x) - x * float(timestep) / 500 + 0.3

    got = sample(predict, NOISE, scheduled("flow", 7, shift))
    timesteps = list(asked)

    sigmas = [shift * s / (1 + (shift - 1) * s) for s in ((7 - i) / 7 for i in range(7))]
    x = NOISE.double()
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        x = x + (following - sigma) * predict(x, torch.tensor(1000 * sigma, dtype=torch.float64), sigma)
    assert timesteps == pytest.approx([1000 * s for s in sigmas], rel=1e-5)
    torch.testing.assert_close(got, x.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("objective", "first"), [("flow", 1000), ("epsilon", 999)])
def test_the_backbone_is_asked_once_a_step_from_noise_to_data(objective, first):
    asked = []

    def predict(x: torch.Tensor, timestep: torch.Tensor, t: float) -> torch.Tensor:
        asked.append((float(timestep), 1000 * t))
        return torch.zeros_like(x)

    scheduler = scheduled(objective, 12, 3.0)
    sample(predict, NOISE, scheduler)
    timesteps = scheduler.timesteps.tolist()
    assert len(timesteps) == 12
    assert asked == [(t, pytest.approx(t)) for t in timesteps]
    assert timesteps[0] == first
    assert timesteps == sorted(timesteps, reverse=True)
    assert 0 < timesteps[-1] < 500


def test_bf16_predictions_are_followed_in_fp32():
    def predict(x: torch.Tensor, timestep: torch.Tensor, t: float) -> torch.Tensor:
        assert x.dtype == torch.float32
        return velocity(x, timestep, t).bfloat16()

    drawn = sample(predict, NOISE, scheduled("flow", 50))
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, draw_with("flow", 50), rtol=0, atol=0.02)


def test_start_noise_depends_on_the_seed_alone():
    batch = start_noise([3, 1, 4], (4, 6, 6))
    assert torch.equal(start_noise([4], (4, 6, 6)), batch[2:])
    assert not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_a_step_can_stop_the_sampling(objective):
    """None stops it: the latents are those after the step, and the backbone is not asked again."""
    told, asked = [], []

    def predict(x: torch.Tensor, timestep: torch.Tensor, t: float) -> torch.Tensor:
        asked.append(float(timestep))
        return (velocity if objective == "flow" else epsilon)(x, timestep, t)

    def on_step(i: int, timestep: torch.Tensor, latent: torch.Tensor) -> torch.Tensor | None:
        told.append((i, float(timestep), latent))
        return None if (i == 2 and stops) else latent

    stops = False
    whole = sample(predict, NOISE, scheduled(objective, 5), on_step)
    assert torch.equal(whole, draw_with(objective, 5))
    assert [i for i, _, _ in told] == [0, 1, 2, 3, 4]
    assert [t for _, t, _ in told] == asked
    assert torch.equal(told[-1][2], whole)

    stops, third = True, told[2][2]
    asked.clear()
    assert torch.equal(sample(predict, NOISE, scheduled(objective, 5), on_step), third)
    assert len(asked) == 3


def test_a_step_can_give_other_latents():
    given = []

    def predict(x: torch.Tensor, timestep: torch.Tensor, t: float) -> torch.Tensor:
        given.append(x)
        return torch.zeros_like(x)

    got = sample(predict, NOISE, scheduled("flow", 3), lambda i, timestep, latent: latent + i + 1)
    for latent, added in zip([*given, got], (0, 1, 3, 6), strict=True):
        torch.testing.assert_close(latent, NOISE + added)


# ---- generate ----


def texts() -> tuple[PackedText, PackedText]:
    generator = torch.Generator().manual_seed(2)
    captions = [torch.randn(n, 5, generator=generator) for n in (3, 1, 2)]
    return PackedText.pack(captions), PackedText.pack([torch.randn(1, 5, generator=generator)])


def trained(mask: str = "adaln_single", ffn: str = "uniform", **more: Any) -> DiT:
    """A model with random parameters, as after some training: nothing is 0."""
    torch.manual_seed(0)
    model = DiT(replace(TINY, mask=mask, ffn=ffn, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def caches(model: DiT, text: PackedText, null: PackedText, scheduler: Any) -> tuple[Any, Any, Any]:
    """The backbone's work that is done once per prompt."""
    return model.encode_text(text), model.encode_text(null), model.embed_times(scheduler.timesteps)


@torch.no_grad()
def test_generate_is_the_loop_around_the_guided_backbone():
    """Its latents against the loop with both halves one after the other, each caption as it is."""
    model, (text, null), noise = trained(), texts(), start_noise([5, 6, 7], (4, 6, 8))

    def predict(x: torch.Tensor, timestep: torch.Tensor, t: float) -> torch.Tensor:
        with_text, without = (
            backbones.predict(model, x, timestep.expand(3), half).sample_BCHW for half in (text, null * 3)
        )
        return without + (3.0 if 0.4 <= t <= 0.9 else 1.0) * (with_text - without)

    expected = sample(predict, noise, scheduled("flow", 6))
    scheduler, guidance = scheduled("flow", 6), Guidance(3.0, (0.4, 0.9))
    drawn = generate(model, *caches(model, text, null, scheduler), noise, scheduler, guidance, torch.float32)
    torch.testing.assert_close(drawn.latent_BCHW, expected, rtol=1e-3, atol=1e-3)
    assert drawn.masks_BSKN is drawn.work is None


@torch.no_grad()
@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_generate_draws_each_picture_from_its_own_seed_and_caption(objective):
    model, (text, null) = trained(), texts()

    def drawn(text: PackedText, seeds: list[int], scale: float = 3.0) -> Any:
        scheduler = scheduled(objective, 4, 3.0)
        given = *caches(model, text, null, scheduler), start_noise(seeds, (4, 6, 8)), scheduler
        return generate(model, *given, Guidance(scale), torch.float32, keep_masks=True)

    together = drawn(text, [5, 6, 7])
    assert together.latent_BCHW.shape == (3, 4, 6, 8)
    assert together.latent_BCHW.isfinite().all()
    assert together.masks_BSKN.shape == (3, 4, 2, 12)
    assert together.timesteps == tuple(scheduled(objective, 4, 3.0).timesteps.tolist())

    alone = drawn(PackedText.pack([text.captions()[1]]), [6])
    torch.testing.assert_close(alone.latent_BCHW, together.latent_BCHW[1:2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alone.masks_BSKN, together.masks_BSKN[1:2], rtol=1e-3, atol=1e-3)

    # The masks kept are those of the half with text: at the first step guidance has changed nothing yet.
    plain = drawn(text, [5, 6, 7], scale=1.0)
    torch.testing.assert_close(plain.masks_BSKN[:, 0], together.masks_BSKN[:, 0])
    assert not torch.allclose(plain.masks_BSKN[:, -1], together.masks_BSKN[:, -1])


@torch.no_grad()
def test_generate_with_a_backbone_that_predicts_0_gives_the_noise_back():
    """In fp32, whatever the backbone computes in; it gets `dtype`, and nothing is made again of captions that were encoded."""
    model, (text, null), noise = trained().bfloat16(), texts(), start_noise([5, 6, 7], (4, 6, 8))
    scheduler = scheduled("flow", 4, 3.0)
    cached = caches(model, text.to(CPU, torch.bfloat16), null.to(CPU, torch.bfloat16), scheduler)

    def backbone(latent: torch.Tensor, given: CachedConditioning, skip: Skip | None, **more: Any) -> Prediction:
        assert latent.dtype == torch.bfloat16
        assert (len(latent), len(given), skip, more) == (6, 6, None, {"budget": ComputeBudget()})
        assert given.text.blocks[0][0].keys.data_ptr() == cached[0].blocks[0][0].keys.data_ptr()
        prediction = model(latent, given, skip)
        return replace(prediction, sample_BCHW=torch.zeros_like(prediction.sample_BCHW))

    drawn = generate(backbone, *cached, noise, scheduler, Guidance(3.0), torch.bfloat16, keep_masks=True)
    assert torch.equal(drawn.latent_BCHW, noise)
    assert drawn.masks_BSKN.dtype == torch.float32


@torch.no_grad()
def test_generate_stops_where_a_step_says_so():
    model, (text, null), noise = trained(), texts(), start_noise([5, 6, 7], (4, 6, 8))
    latents = []

    def on_step(i: int, timestep: torch.Tensor, latent: torch.Tensor) -> torch.Tensor | None:
        latents.append(latent)
        return None if i == 1 else latent

    scheduler = scheduled("flow", 4)
    given = *caches(model, text, null, scheduler), noise, scheduler, Guidance(3.0), torch.float32
    drawn = generate(model, *given, Skip(0.5), keep_masks=True, on_step=on_step)
    assert len(latents) == 2
    assert torch.equal(drawn.latent_BCHW, latents[-1])
    assert drawn.masks_BSKN.shape == (3, 2, 2, 12)
    assert drawn.work.kept_SK.shape == (2, 2)
    assert len(drawn.timesteps) == 2


@torch.no_grad()
@pytest.mark.parametrize("ffn", ["uniform", "shared"])
@pytest.mark.parametrize("unit", ["token", "layer"])
def test_the_work_counted_is_what_the_ffns_were_given(unit, ffn):
    """Both halves where there is guidance, at t = ⅚, ⅔ and ½; against what the masks and hooks say."""
    model, (text, null), noise = trained("release", ffn), texts(), start_noise([5, 6, 7], (4, 6, 8))
    plain = backbones.predict(model, noise, torch.full((3,), 500.0), text).masks_KBN
    skip = Skip((plain if unit == "token" else plain.mean(-1)).quantile(0.45).item(), unit)
    rows, masks = [], []
    for block in model.blocks:
        block.ffn.register_forward_pre_hook(lambda m, given: rows[-1].__setitem__(m, given[0].flatten(0, -2).shape[0]))

    def backbone(*given: Any, **more: Any) -> Prediction:
        rows.append({})
        prediction = model(*given, **more)
        masks.append(prediction.masks_KBN)
        return prediction

    scheduler = scheduled("flow", 6)
    given = *caches(model, text, null, scheduler), noise, scheduler, Guidance(3.0, (0.4, 0.9))
    work = generate(backbone, *given, torch.float32, skip).work
    assert work.tokens_SK[:, 0].tolist() == [36, 72, 72, 72, 36, 36]
    assert work.kept_SK.tolist() == [[step.get(block.ffn, 0) for block in model.blocks] for step in rows]
    if unit == "token":
        assert work.kept_SK.tolist() == [(m > skip.threshold).sum((1, 2)).tolist() for m in masks]
    else:
        assert work.kept_SK.tolist() == [(12 * (m.mean(-1) >= skip.threshold).sum(1)).tolist() for m in masks]
    assert 0 < work.kept_SK.sum() < work.tokens_SK.sum()


# ---- waiting for the device ----

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "copy to another device"}


class Recorder(TorchDispatchMode):
    """Keeps the names of all operations, and whether one copies to another device."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_to_copy" and kwargs.get("device", args[0].device) != args[0].device:
            name = "copy to another device"
        self.names.append(name)
        return func(*args, **kwargs)


@torch.no_grad()
def waits_in_the_loop(
    objective: str,
    skip: Skip | None = None,
    where: str = "",
    sampler: str = "ode",
    model: DiT | None = None,
    rule: BudgetRule | None = None,
) -> set[str]:
    """The operations that wait for the device, from the backbone's first call to the last step's end."""
    model, (text, null), recorder, marks = model or trained("release", "shared"), texts(), Recorder(), []

    def backbone(latent: torch.Tensor, *given: Any, **more: Any) -> Prediction:
        marks.append(len(recorder.names))
        if where == "backbone":
            latent.mean().item()
        return model(latent, *given, **more)

    def on_step(i: int, timestep: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        if where == "step":
            latent.to("meta")
        marks.append(len(recorder.names))
        return latent

    scheduler = scheduled(objective, 4, 3.0, sampler)
    given = *caches(model, text, null, scheduler), start_noise([5, 6, 7], (4, 6, 8)), scheduler
    with recorder:
        generate(backbone, *given, Guidance(3.0, (0.0, 0.8)), torch.float32, skip, True, on_step, rule=rule)
    assert len(marks) == 2 * 4
    loop = recorder.names[marks[0] : marks[-1]]
    assert loop.count("addmm") > 4, "the backbone's products are seen"
    return WAITS & set(loop)


@pytest.mark.parametrize(("objective", "sampler"), [("flow", "ode"), ("flow", "sde"), ("epsilon", "ode")])
def test_without_skip_nothing_in_the_loop_waits_for_the_device(objective, sampler):
    assert waits_in_the_loop(objective, sampler=sampler) == set()


def test_of_the_mediators_rules_one_alone_asks_for_the_changes(monkeypatch):
    """Only there is something to wait for, which the recorder does not see on a CPU."""
    asked_for = []
    monkeypatch.setattr(switching, "change", lambda after, before: asked_for.append(1) or change(after, before))
    model = trained("release", "shared", attention="mediators", mediators=MediatorsSection((1, 4)))
    for asked in ({}, {"mediators": 4}):
        assert waits_in_the_loop("flow", model=model, rule=choose_rule(model.config, **asked)) == set()
    assert asked_for == []
    waits_in_the_loop("flow", model=model, rule=choose_rule(model.config, rho=[1e-9]))
    assert len(asked_for) == 3, "after each of four steps but the last"


def test_the_recorder_sees_what_waits(monkeypatch):
    """Skipping, which has to know how many tokens are kept; a number read; a copy; a scheduler that looks for its place."""
    assert "nonzero" in waits_in_the_loop("flow", Skip(0.5))
    assert waits_in_the_loop("flow", where="backbone") == {"_local_scalar_dense"}
    assert waits_in_the_loop("flow", where="step") == {"copy to another device"}
    monkeypatch.delattr(FlowMatchEulerDiscreteScheduler, "set_begin_index")
    assert waits_in_the_loop("flow") >= {"nonzero", "_local_scalar_dense"}
