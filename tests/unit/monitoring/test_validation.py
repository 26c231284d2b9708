"""Validation in one process: losses against a plain reference, their curves, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_sets import loader_of, write_set

from pretrain.compilation import compile_for_training
from pretrain.config import load
from pretrain.data.validation_set import ValidationBatch
from pretrain.diffusion import EpsilonPrediction, RectifiedFlow, draw
from pretrain.diffusion.ddpm import BETA_END, BETA_START, STEPS
from pretrain.distributed.torch_private import compiled_graphs
from pretrain.distributed.world import World
from pretrain.models import DiT, PackedText
from pretrain.monitoring.validation import Validation, by_level, curves, validation_loss

ENGINE: Any = SimpleNamespace(world=World.alone(), dtype=torch.float32)
WORDS = ("data.validation=b", "data.validation_samples=16", "logging.validate_every=4", "steps=10")


class Monitor:
    """Keeps the points by curve and step, and whether the speed was paused."""

    def __init__(self) -> None:
        self.points: dict[tuple[str, int], float] = {}
        self.running = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.running = False
        yield
        self.running = True

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.points |= {(tag, step): value for tag, value in values.items()}


class Average:
    """Within `applied` every weight of the last layer is half of what it is, and of ema_0.9 a quarter."""

    def __init__(self, model: DiT, *more: str) -> None:
        self.weight = model.final.proj.weight
        self.partitions = dict.fromkeys(("ema", *more))

    @contextmanager
    def applied(self, name: str) -> Iterator[None]:
        before = self.weight.detach().clone()
        self.weight.data.mul_({"ema": 0.5, "ema_0.9": 0.25}[name])
        yield
        self.weight.data.copy_(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("validation") / "set", {"a": 8, "b": 20})


@pytest.fixture(scope="module")
def batches(root: Path) -> list[ValidationBatch]:
    return loader_of(root, *WORDS[:2], micro=2).validation_batches()


def model_of(*overrides: str) -> DiT:
    torch.manual_seed(0)
    model = DiT(load("demo_256", ["data.path=/set", *overrides])[0].model.backbone())
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh block changes nothing
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


@pytest.fixture
def made(root: Path, batches: list[ValidationBatch]) -> Callable[..., Validation]:
    def build(*overrides: str, stopping: Callable[[], bool] = lambda: False) -> Validation:
        config = load("demo_256", [f"data.path={root}", *WORDS, "optimizer.warmup_steps=1", *overrides])[0]
        loader: Any = SimpleNamespace(validation_batches=lambda: batches)
        return Validation(config, loader, config.objective.build(), begin=activities.append, stopping=stopping)

    activities: list[str] = []
    build.activities = activities  # type: ignore[attr-defined]
    return build


def test_it_is_due_before_the_first_step_every_so_many_and_after_the_last(made) -> None:
    validation = made()
    assert [step for step in range(11) if validation.due(step)] == [0, 4, 8, 10]
    assert not [step for step in range(11) if made("data.validation=null").due(step)]


# ---- the losses ----


def test_losses_are_those_of_a_plain_reference(batches: list[ValidationBatch]) -> None:
    """Flow: x_t = (1 − t)·x + t·ε against ε − x. Each sample by itself, its text unpadded."""
    model = model_of()
    for held_out in batches:
        loss_B = validation_loss(ENGINE, model, RectifiedFlow(0.3, 1.4, 5.0), held_out)
        assert loss_B.dtype == torch.float32 and len(loss_B) == 2
        batch = held_out.batch
        for i, text in enumerate(batch.text.captions()):
            numbers = draw(batch.seeds[i : i + 1], batch.mean_BCHW[:1].shape, ENGINE.world.device)
            assert batch.std_BCHW is not None
            x = batch.mean_BCHW[i].float() + batch.std_BCHW[i].float() * numbers.posterior_BCHW[0]
            noise, t = numbers.noise_BCHW[0], held_out.t
            conditioning = model.condition(torch.tensor([1000 * t]), PackedText.pack([text.float()]))
            with torch.no_grad():
                predicted = model(((1 - t) * x + t * noise)[None], conditioning).sample_BCHW[0]
            torch.testing.assert_close(loss_B[i], (predicted - (noise - x)).square().mean(), rtol=1e-5, atol=0)


def test_losses_of_the_noise_objective(batches: list[ValidationBatch]) -> None:
    """A model that predicts nothing has the noise's mean square for a loss; at t = 0 its input is next to the data."""
    seen = []

    class Nothing(DiT):
        def forward(self, latent_BCHW: Any, conditioning: Any, *rest: Any) -> Any:
            seen.append((latent_BCHW, conditioning.timestep_B))
            return SimpleNamespace(sample_BCHW=torch.zeros_like(latent_BCHW))

    model = Nothing(load("demo_256", ["data.path=/set"])[0].model.backbone())
    kept = torch.cumprod(1 - torch.linspace(BETA_START, BETA_END, STEPS, dtype=torch.float64), 0)
    for held_out in batches:
        loss_B = validation_loss(ENGINE, model, EpsilonPrediction(), held_out)
        batch = held_out.batch.to(torch.device("cpu"), torch.float32)
        numbers = draw(batch.seeds, batch.mean_BCHW.shape, ENGINE.world.device)
        torch.testing.assert_close(loss_B, numbers.noise_BCHW.square().mean((1, 2, 3)))
        latent, timestep = seen.pop()
        assert timestep.tolist() == [1000 * held_out.t] * 2
        share = kept[int(1000 * held_out.t)].item()
        expected = share**0.5 * batch.latent(numbers.posterior_BCHW) + (1 - share) ** 0.5 * numbers.noise_BCHW
        torch.testing.assert_close(latent, expected)


@pytest.mark.parametrize(
    "words",
    [
        ("model.density=flexdit", "model.depth=8", "model.mask=none"),
        ("model.attention=mediators", "model.mask=none"),
        ("model.mask=none",),
    ],
)
def test_methods_that_leave_a_choice(batches: list[ValidationBatch], words: tuple[str, ...]) -> None:
    """Each noise level has the budget of sampling."""
    model = model_of(*words)
    losses = [validation_loss(ENGINE, model, RectifiedFlow(), held_out) for held_out in batches]
    assert all(loss_B.isfinite().all() and (loss_B > 0).all() for loss_B in losses)
    assert {held_out.t for held_out in batches} == {i / 8 for i in range(8)}


def test_curves() -> None:
    losses = torch.arange(16, dtype=torch.float64)
    assert by_level(losses).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    points = curves("validation", by_level(losses))
    assert points.pop("validation/loss") == 7.5
    assert points == {
        f"validation/loss_t{t}": 4.0 + i
        for i, t in enumerate(("0.000", "0.125", "0.250", "0.375", "0.500", "0.625", "0.750", "0.875"))
    }


# ---- a validation ----


def test_it_writes_the_losses_of_weights_and_averages(made, batches, capsys: pytest.CaptureFixture[str]) -> None:
    model, monitor = model_of(), Monitor()
    made().run(ENGINE, model, Average(model, "ema_0.9"), monitor, 4)
    expected = []
    for weight in (1.0, 0.5, 0.5):
        with torch.no_grad():
            model.final.proj.weight.mul_(weight)
        losses = torch.zeros(16, dtype=torch.float64)
        for held_out in batches:
            losses[list(held_out.numbers)] = validation_loss(ENGINE, model, RectifiedFlow(), held_out).double()
        expected.append(losses)
    assert monitor.running and len(monitor.points) == 27 + model.config.depth
    for name, losses in zip(("validation", "validation_ema", "validation_ema_0.9"), expected, strict=True):
        assert monitor.points[f"{name}/loss", 4] == pytest.approx(losses.mean().item(), rel=1e-12)
        assert monitor.points[f"{name}/loss_t0.375", 4] == pytest.approx(losses[[3, 11]].mean().item(), rel=1e-12)
    words = (
        f"step 4/10  validation loss {expected[0].mean():.4f}, of ema {expected[1].mean():.4f}, "
        f"of ema_0.9 {expected[2].mean():.4f}  (16 samples, "
    )
    assert capsys.readouterr().out.startswith(words)
    assert made.activities[0] == "validating the weights, batch 1 of 8"
    assert made.activities[-1] == "validating the average ema_0.9, batch 8 of 8" and len(made.activities) == 24


def test_it_leaves_all_as_it_was(made) -> None:
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    made().run(ENGINE, model, Average(model), Monitor(), 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_request_to_stop_breaks_it_off(made, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the third batch; no figure is written."""
    model, monitor, asked = model_of(), Monitor(), iter([False, False, True, True])
    made(stopping=lambda: next(asked)).run(ENGINE, model, Average(model), monitor, 4)
    assert len(made.activities) == 2 and not monitor.points and model.training
    assert capsys.readouterr().out == "step 4/10  validation broken off, as the run was asked to stop\n"


@pytest.fixture
def no_graphs() -> Iterator[None]:
    """No graphs of other tests, and torch's own settings afterwards."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


def test_compiled_blocks_get_no_graphs_for_it(root: Path, made, no_graphs: None) -> None:
    """Before and after a step that is compiled; the figures are those of a model that is not."""
    compiling = loader_of(root, *WORDS[:2], "model.compile=true", micro=2).validation_batches()
    model, eager = model_of(), model_of()
    compile_for_training(model, backend="eager")
    batch = compiling[0].batch.to(torch.device("cpu"), torch.float32)
    counts, points = [compiled_graphs()], []
    for _ in range(2):
        for dit in (model, eager):
            monitor, validation = Monitor(), made("model.compile=true")
            validation.batches = compiling
            validation.run(ENGINE, dit, Average(dit), monitor, 4)
            points.append(monitor.points)
        counts.append(compiled_graphs())
        model(batch.mean_BCHW, model.condition(torch.tensor([100.0, 900.0]), batch.text)).sample_BCHW.sum().backward()
        counts.append(compiled_graphs())
    assert counts[0] == counts[1] < counts[2] == counts[3] == counts[4]
    assert points[0] == points[1] == points[2] == points[3] and len(points[0]) == 18 + model.config.depth
