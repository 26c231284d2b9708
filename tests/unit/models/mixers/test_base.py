"""A method is one file and one line in a table: one that is made here is built, counted, refused, budgeted and drawn with."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from backbones import predict
from torch import Tensor, nn

from pretrain.diffusion import Guidance, RectifiedFlow, generate, start_noise, step_budget
from pretrain.models import ComputeBudget, DiT, DiTConfig, PackedText, inheritance
from pretrain.models import mixers as table
from pretrain.models.budget_choices import default_budget, every_budget
from pretrain.models.cost import count_flops, count_parameters
from pretrain.models.grids import Grid
from pretrain.models.mixers.base import (
    Attention,
    Modulation,
    Positions,
    TokenMixer,
    TokenState,
    TrainingChoice,
)
from pretrain.schedulers import build_scheduler, set_timesteps


class Shift(nn.Module):
    """Each token receives the value of the token `by` places before it."""

    def __init__(self, width: int):
        super().__init__()
        self.value = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, by: int) -> Tensor:
        return self.value(x_BND.roll(by, 1))


class ShiftMixer(TokenMixer):
    def __init__(self, width: int):
        super().__init__()
        self.width, self.attention = width, Shift(width)
        self.extra = {"shift_gate": nn.Linear(width, width)}

    def initialise(self) -> None:
        nn.init.zeros_(self.extra["shift_gate"].weight)

    def mix(self, state: TokenState, modulation: Modulation, positions: Positions) -> tuple[TokenState, Tensor]:
        by = positions.coarse["shift"].grid[0]
        x_BND = modulation.apply(state.x_BND)
        return state, self.attention(x_BND, by) + self.extra["shift_gate"](x_BND)

    def macs(self, tokens: Grid, budget: ComputeBudget) -> int:
        return 2 * math.prod(tokens) * self.width**2

    def kept_vectors(self, tokens: Grid, budget: ComputeBudget) -> int:
        return 3 * math.prod(tokens)


class ShiftMethod(Attention):
    name = "shift"
    optional_parameters = (".shift_gate.",)
    choices = (1, 2)  # type: ignore[assignment]

    def mixer(self) -> TokenMixer:
        return ShiftMixer(self.width)

    def problems(self) -> list[str]:
        return [f"width: {self.width} must be above 8 to be shifted"] if self.width <= 8 else []

    def grid_problems(self, tokens: Grid) -> list[str]:
        return ["attention: nothing to shift by"] if math.prod(tokens) < 2 else []

    def default_choice(self, t: float) -> int:
        return 2 if t > 0.5 else 1

    def training_choice(self, cdf: Callable[[float], float], seed: int, step: int) -> TrainingChoice:
        half = cdf(0.5)
        return TrainingChoice(1, (0.0, half)) if step % 2 else TrainingChoice(2, (half, 1.0))

    def coarse_grid(self, tokens: Grid, choice: int) -> Grid:
        return choice, 1


CONFIG = DiTConfig(width=16, heads=2, depth=2, patch=1, latent_channels=3, text_width=5, attention="shift")


@pytest.fixture(autouse=True)
def in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.ATTENTIONS, "shift", ShiftMethod)


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(0)
    return DiT(CONFIG).double().eval()


def test_it_is_built_with_its_parameters_and_their_start(model: DiT) -> None:
    names = {name.partition("blocks.0.")[2] for name, _ in model.named_parameters() if name.startswith("blocks.0.")}
    assert {"self_attention.value.weight", "shift_gate.weight"} <= names
    assert (model.blocks[0].shift_gate.weight == 0).all() and (model.blocks[0].self_attention.value.weight != 0).any()
    assert list(model.blocks[0].state_dict())[-1] == "shift_gate.bias", "a mixer's own modules come last"


def test_its_cost_is_counted(model: DiT) -> None:
    assert count_parameters(CONFIG).total == sum(p.numel() for p in model.parameters())
    full = replace(CONFIG, attention="full")
    fewer = count_flops(full, (4, 4), 7, ComputeBudget()).attention - count_flops(CONFIG, (4, 4), 7).attention
    assert fewer == 2 * 2 * (2 * 16 * 16**2 + 2 * 16**2 * 16), (
        "in two blocks: q, k, v and out against two; no N² products"
    )


def test_its_problems_are_told() -> None:
    small = replace(CONFIG, width=8)
    assert small.problems() == ["width: 8 must be above 8 to be shifted"]
    with pytest.raises(ValueError, match="must be above 8"):
        DiT(small)
    assert CONFIG.grid_problems((1, 1)) == ["attention: nothing to shift by"]
    assert replace(CONFIG, attention="none").problems() == ["attention: 'none' is none of full, mediators, shift"]


def test_a_trained_model_may_lack_its_optional_parameters() -> None:
    """`inheritance.py`, run with the method in the table, has the names by which a restored checkpoint may lack parameters."""
    assert ".shift_gate." in runpy.run_path(inheritance.__file__)["optional_parameters"]


def test_its_choice_is_in_every_budget(model: DiT) -> None:
    assert default_budget(CONFIG, 0.9) == ComputeBudget.of(shift=2)
    assert every_budget(CONFIG) == [ComputeBudget.of(shift=1), ComputeBudget.of(shift=2)]
    assert every_budget(replace(CONFIG, density="flexdit", depth=8))[0] == ComputeBudget.of(shift=1, flexdit=0)
    text = PackedText.pack([torch.randn(3, 5).double()])
    given = torch.randn(1, 3, 4, 4).double(), torch.tensor([900.0]), text
    default = predict(model, *given).sample_BCHW
    assert torch.equal(default, predict(model, *given, budget=ComputeBudget.of(shift=2)).sample_BCHW)
    with pytest.raises(ValueError, match="shift: 3 is none of 1, 2"):
        predict(model, *given, budget=ComputeBudget.of(shift=3))


def test_training_steps_take_its_choice_and_group() -> None:
    steps = [step_budget(CONFIG, RectifiedFlow(), seed=0, step=s) for s in range(2)]
    assert [s.budget for s in steps] == [ComputeBudget.of(shift=2), ComputeBudget.of(shift=1)]
    assert [s.times for s in steps] == [(0.5, 1.0), (0.0, 0.5)]
    assert [s.group for s in steps] == [2, 1]


def test_sampling_follows_it(model: DiT) -> None:
    scheduler = build_scheduler("flow", 1.0)
    set_timesteps(scheduler, 4, torch.device("cpu"))
    text = PackedText.pack([torch.randn(3, 5).double()])
    caches = model.encode_text(text), model.encode_text(text), model.embed_times(scheduler.timesteps)
    with torch.no_grad():
        drawn = generate(model, *caches, start_noise([0], (3, 4, 4)), scheduler, Guidance(1.0), torch.float64)
    assert [budget.get("shift") for (budget,) in drawn.budgets_SB] == [2, 2, 1, 1]  # at t = 1, ¾, ½, ¼
    assert drawn.latent_BCHW.isfinite().all()
