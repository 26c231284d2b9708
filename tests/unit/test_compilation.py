"""torch.compile: the number of graphs, whatever the captions; equal results; and no way back to eager unnoticed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from backbones import build
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from pretrain import compilation
from pretrain.compilation import GRAPHS, compile_for_sampling, compile_for_training, eager_mode
from pretrain.diffusion import Guidance, generate, kept_tokens, start_noise
from pretrain.distributed.torch_private import compiled_graphs
from pretrain.models import CachedConditioning, DiT, PackedText, Prediction, preset
from pretrain.models.budget_choices import every_budget
from pretrain.models.focusdit.mask import dropout_factors
from pretrain.models.mixers.mediators import MediatorsSection
from pretrain.models.routing import Routing
from pretrain.models.text import TEXT_MULTIPLE
from pretrain.pipeline import FocusDiTTransformer2DModel
from pretrain.schedulers import build_scheduler, set_timesteps

SMALL = {"width": 32, "heads": 2, "text_width": 8, "latent_channels": 3, "mask_hidden": (8, 4)}
BACKBONES = {
    "dit": preset("dit_1b"),
    "focusdit": preset("focusdit_1b"),
    "flexdit": replace(preset("dit_1b"), density="flexdit"),
    "mediators": replace(preset("dit_1b"), attention="mediators", mediators=MediatorsSection((1, 4, 16))),
}


@pytest.fixture(autouse=True)
def fresh():
    """No graphs of earlier tests, and torch's own settings afterwards."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


def captions(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randn(length, 8, generator=generator) for length in lengths]


def preview(model: DiT) -> Tensor:
    text = PackedText.pack(captions([3, 7, 7]))
    (time,) = model.embed_times(torch.tensor([400.0]))
    with torch.no_grad(), eager_mode(True):
        return model(start_noise([1, 2, 3], (3, 16, 16)), CachedConditioning(time, model.encode_text(text))).sample_BCHW


def train_steps(model: DiT, steps: int, routing: Routing | None = None) -> list[Tensor]:
    """Predictions of steps whose captions differ in length, or agree; and gradients of the last. Half of them are routed."""
    config, rng, found = model.config, random.Random(0), []
    budgets = every_budget(config) if config.open_methods else [None]
    for step in range(steps):
        longest = rng.randint(2, 300)
        lengths = [longest, longest] if step % 5 == 0 else [longest, rng.randint(1, longest)]
        keep = None
        if config.mask != "none":
            generator = torch.Generator().manual_seed(step)
            keep = dropout_factors(torch.rand(2, config.depth * 64, generator=generator), config.depth, 0.1)
        timestep, latent = torch.tensor([100.0 + step, 900.0]), start_noise([step, step + 50], (3, 16, 16))
        conditioning = model.condition(timestep, PackedText.pack(captions(lengths), TEXT_MULTIPLE))
        route = None
        if routing is not None and step < steps // 2:
            route = routing.route(kept_tokens([step, step + 50], 64, routing.kept(64), latent.device))
        prediction = model(latent, conditioning, None, keep, budgets[step % len(budgets)], route)
        prediction.sample_BCHW.square().mean().backward()
        found.append(prediction.sample_BCHW.detach())
        if step % 4 == 1:
            found.append(preview(model))
    return found


@pytest.mark.parametrize("kind", BACKBONES)
def test_few_graphs_in_training_whatever_the_captions_with_previews_among(kind):
    """Of more blocks than torch keeps graphs by default; counted with the backend that compiles nothing."""
    config = replace(BACKBONES[kind], **SMALL, depth=12)
    eager, model = build(config), build(config)
    compile_for_training(model, backend="eager")
    before = compiled_graphs()
    steps = 2 * len(every_budget(config)) if config.open_methods else 6
    for got, expected in zip(train_steps(model, steps), train_steps(eager, steps), strict=True):
        torch.testing.assert_close(got, expected)
    assert 0 < compiled_graphs() - before <= GRAPHS[kind]
    for mine, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("kind", ["dit", "focusdit"])
@pytest.mark.parametrize(("name", "first", "last"), [("tread", 2, 10), ("tread", 0, 12), ("sprint", 2, 10)])
def test_token_routing_keeps_the_bound(name, first, last, kind):
    """Routed steps and then steps of all tokens."""
    fusion = (first, last) if name == "sprint" else None
    config = replace(BACKBONES[kind], **SMALL, depth=12, fusion=fusion)
    routing = Routing(name, 0.5, first, last, 0.5)
    eager, model = build(config), build(config)
    compile_for_training(model, backend="eager")
    before = compiled_graphs()
    for got, expected in zip(train_steps(model, 6, routing), train_steps(eager, 6, routing), strict=True):
        torch.testing.assert_close(got, expected)
    assert 0 < compiled_graphs() - before <= GRAPHS[kind]
    for mine, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_more_graphs_than_the_limit_are_an_error_and_no_eager_mode(monkeypatch):
    monkeypatch.setattr(compilation, "LIMIT", 1)
    model = build(replace(BACKBONES["focusdit"], **SMALL, depth=2))
    compile_for_training(model, backend="eager")
    with pytest.raises(FailOnRecompileLimitHit):
        train_steps(model, 2)


def test_with_the_backward_pass_compiled_too_the_training_is_the_same():
    """Traced by torch's autograd, the captions' lengths a variable; recomputed in the backward pass or not."""
    config = replace(BACKBONES["focusdit"], **SMALL, depth=2)
    expected = build(config)
    losses = train_steps(expected, 3)
    for recompute in (False, True):
        model = build(config)
        model.recompute = recompute
        compile_for_training(model, backend="aot_eager")
        for got, other in zip(train_steps(model, 3), losses, strict=True):
            torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-5)
        for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5)


def drawn(shell: FocusDiTTransformer2DModel, lengths: list[int]) -> Tensor:
    """Pictures of four steps, of which the last two are without guidance."""
    scheduler, dit = build_scheduler("flow", 1.0), shell.dit
    set_timesteps(scheduler, 4, torch.device("cpu"))

    def backbone(latent, conditioning, skip, *, budget):
        return Prediction(*shell(latent, skip=skip, return_dict=False, budget=budget, conditioning=conditioning))

    with torch.no_grad():
        text, null = (shell.encode_text(PackedText.pack(captions(some))) for some in (lengths, [1]))
        noise = start_noise(range(len(lengths)), (3, 16, 16))
        times = dit.embed_times(scheduler.timesteps)
        guidance = Guidance(3.0, (0.6, 1.0))
        return generate(backbone, text, null, times, noise, scheduler, guidance, torch.float32).latent_BCHW


@pytest.mark.parametrize("how", ["blocks", "graphs"])
def test_few_graphs_in_sampling_whatever_the_prompts(how):
    """Ten prompts in batches of four: with guidance and without, and a smaller batch at the end."""
    batches = [[5, 70, 70, 12], [200, 3, 9, 130], [64, 1]]
    config = replace(BACKBONES["focusdit"], **SMALL, depth=4)
    plain, shell = (FocusDiTTransformer2DModel.of(build(config)).eval() for _ in range(2))
    compile_for_sampling(shell, shell.dit, how, backend="eager")
    before = compiled_graphs()
    for lengths in batches:
        torch.testing.assert_close(drawn(shell, lengths), drawn(plain, lengths), rtol=1e-4, atol=1e-5)
    assert 0 < compiled_graphs() - before <= GRAPHS["sampling"]
