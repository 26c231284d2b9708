"""The rules for each picture's budget at each step, and batches whose pictures differ in it.

Letters: B images, S sampling steps, K blocks, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.diffusion import BudgetRule, Fixed, Generated, Guidance, Switching, choose_rule, generate, start_noise
from pretrain.diffusion.switching import change
from pretrain.models import ComputeBudget, DiT, DiTConfig, PackedText, Skip
from pretrain.models.budget_choices import default_budget
from pretrain.models.mixers.flexdit import FlexDiTSection
from pretrain.models.mixers.mediators import MediatorsSection
from pretrain.schedulers import build_scheduler, set_timesteps

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DiTConfig(
    width=16,
    heads=2,
    depth=2,
    patch=1,
    latent_channels=4,
    text_width=5,
    attention="mediators",
    mediators=MediatorsSection((1, 4, 9)),
)
FULL = replace(CONFIG, attention="full")
BOTH = replace(
    CONFIG,
    mask="adaln_single",
    density="flexdit",
    depth=6,
    flexdit=FlexDiTSection(split=(1, 1, 1, 1), sparsity=(0.3, 0.6)),
)
SIZE = (4, 4, 6)


# ---- the rules ----


def numbers(rule: BudgetRule, changes: Sequence[float]) -> list[int | None]:
    """The numbers before the first change, after it, and so on."""
    return [rule.budget(0.5, changes[:i]).get("mediators") for i in range(len(changes) + 1)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # The reference, of the second to the fourth change, is 2. From the fifth on one under 1.6 leads to 4, under 0.8 to 9.
        ([9, 2, 2, 2, 1.61, 1.59, 1.0, 0.79, 0.1], [1, 1, 1, 1, 1, 1, 4, 4, 9, 9]),
        ([0.1, 2, 2, 2, 0.7, 3], [1, 1, 1, 1, 1, 9, 9]),
        ([2, 2, 2, 2, 1.5, 5, 0.7, 5, 5], [1, 1, 1, 1, 1, 4, 4, 9, 9, 9]),
        ([9, 0.1, 3, 2.9, 2.5], [1, 1, 1, 1, 1, 1]),
        # Two steps earlier than its source would a rule switch that began at once: at the third change, of 1.0.
        ([2.5, 2.5, 1.0, 2.5, 2.5], [1, 1, 1, 1, 1, 1]),
        ([9, 2, 2, 2, 2, 1.6], [1, 1, 1, 1, 1, 1, 1]),
        ([2, 2, 2, 0.1], [1, 1, 1, 1, 1]),
    ],
)
def test_switching_never_goes_back(changes, expected):
    assert numbers(Switching(CONFIG, (0.8, 0.4)), changes) == expected


def test_switching_between_any_number_of_numbers():
    changes = [5, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    two, four = (replace(CONFIG, mediators=MediatorsSection(m)) for m in ((4, 9), (1, 4, 9, 16)))
    assert numbers(Switching(two, (0.7,)), changes) == [4, 4, 4, 4, 4, 4, 9, 9, 9]
    assert numbers(Switching(four, (0.9, 0.5, 0.3)), changes) == [1, 1, 1, 1, 1, 4, 4, 9, 16]
    assert numbers(Switching(four, (0.9, 2.0, 0.3)), changes) == [1, 1, 1, 1, 1, 9, 9, 9, 16]
    assert numbers(Switching(replace(CONFIG, mediators=MediatorsSection((4,))), ()), changes) == [4] * 9


def test_change_is_of_each_picture():
    before = torch.zeros(2, 4, 2, 2)
    after = before.clone()
    after[1, 0, 0, 0] = -8
    assert change(after, before).tolist() == [0, 0.5]


def test_the_rule_asked_for():
    assert choose_rule(CONFIG) is None, "the backbone's default"
    assert choose_rule(CONFIG, 4) == Fixed(CONFIG, 4)
    assert choose_rule(CONFIG, rho=[0.9, 0.5]) == Switching(CONFIG, (0.9, 0.5))
    assert choose_rule(FULL) is None


@pytest.mark.parametrize(
    ("config", "asked", "mend"),
    [
        (FULL, {"mediators": 4}, "mediators: 4, but this model .full attention"),
        (FULL, {"rho": [0.5]}, "mediator ρ 0.5: this model has full attention; leave them out"),
        (CONFIG, {"mediators": 16}, "mediators: 16 is none of 1, 4, 9, which this model can do"),
        (CONFIG, {"mediators": 0}, "mediators: 0 is none of 1, 4, 9, which this model can do"),
        (CONFIG, {"rho": [0.5]}, r"mediator ρ 0.5: expected 2, one fewer than the model's .* \(1, 4, 9\)"),
        (CONFIG, {"rho": [0.9, 0.8, 0.7]}, "mediator ρ 0.9, 0.8, 0.7: expected 2, one fewer"),
        (CONFIG, {"rho": []}, r"mediator ρ \(none\): expected 2, one fewer"),
        (CONFIG, {"rho": [0.5, 0.0]}, "mediator ρ 0.5, 0: expected finite numbers above 0"),
        (CONFIG, {"rho": [-1, 0.5]}, "mediator ρ -1, 0.5: expected finite numbers above 0"),
        (CONFIG, {"rho": [math.nan, 0.5]}, "mediator ρ nan, 0.5: expected finite numbers above 0"),
        (CONFIG, {"rho": [math.inf, 0.5]}, "mediator ρ inf, 0.5: expected finite numbers above 0"),
        (CONFIG, {"mediators": 4, "rho": [0.9, 0.5]}, "exclude each other; give one"),
    ],
)
def test_what_the_model_cannot_do_is_one_line(config, asked, mend):
    with pytest.raises(ValueError, match=mend) as error:
        choose_rule(config, **asked)
    assert "\n" not in str(error.value)


# ---- drawing by them ----


@pytest.fixture(scope="module")
def model() -> DiT:
    """Mediators, FlexDiT and query masks, with random parameters: nothing is 0. In fp64, to tell rounding from faults."""
    torch.manual_seed(0)
    model = DiT(BOTH).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


CAPTIONS = [torch.randn(n, 5, generator=torch.Generator().manual_seed(n)).double() for n in (3, 1, 2, 2)]


@torch.no_grad()
def draw(
    model: Any, rule: BudgetRule | None, pictures: Sequence[int] = range(4), sampler: str = "ode", **more: Any
) -> Generated:
    """Some of four pictures, by eight equal steps."""
    scheduler = build_scheduler("flow", 1.0, sampler)
    set_timesteps(scheduler, 8, torch.device("cpu"))
    text, null = PackedText.pack([CAPTIONS[i] for i in pictures]), PackedText.pack([CAPTIONS[1]])
    if sampler == "sde":
        more["generator"] = [torch.Generator().manual_seed(i) for i in pictures]
    # Pictures of other scales settle at other times.
    scales = torch.tensor([1.0, 0.2, 4.0, 0.5])[list(pictures), None, None, None]
    noise = start_noise(pictures, SIZE) * scales
    asked = {"guidance": Guidance(3.0, (0.0, 0.7)), "dtype": torch.float64, **more}
    times = model.embed_times(scheduler.timesteps)
    return generate(
        model, model.encode_text(text), model.encode_text(null), times, noise, scheduler, rule=rule, **asked
    )


SWITCHING = Switching(BOTH, (1.05, 0.8))


def mediators_BS(drawn: Generated) -> list[list[int | None]]:
    """The number of mediators of each picture at each step."""
    return [[budget.get("mediators") for budget in steps] for steps in zip(*drawn.budgets_SB, strict=True)]


def test_the_default_is_the_backbones(model):
    """Without a rule the noise level decides, at t = 1, 7/8, …, 1/8; the result says so."""
    drawn = draw(model, None)
    assert mediators_BS(drawn) == [[1, 1, 1, 4, 4, 4, 9, 9]] * 4
    assert drawn.budgets_SB == tuple((default_budget(BOTH, 1 - s / 8),) * 4 for s in range(8))


def test_a_fixed_number_is_what_the_backbone_is_asked_for(model, monkeypatch):
    """It leaves the density to the noise level."""
    asked = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: asked.append(k["budget"]) or forward(*a, **k))
    drawn = draw(model, Fixed(BOTH, 4))
    assert asked == [ComputeBudget.of(mediators=4, flexdit=b) for b in (3, 3, 3, 2, 2, 1, 1, 0)]
    assert mediators_BS(drawn) == [[4] * 8] * 4
    assert not torch.equal(drawn.latent_BCHW, draw(model, Fixed(BOTH, 9)).latent_BCHW)


def test_pictures_of_a_batch_switch_each_by_its_own_changes(model):
    """The numbers are those that the rule gives for the changes that a watcher measures."""
    trail = [start_noise(range(4), SIZE) * torch.tensor([1.0, 0.2, 4.0, 0.5])[:, None, None, None]]
    drawn = draw(model, SWITCHING, on_step=lambda i, timestep, latent: trail.append(latent) or latent)
    schedules = mediators_BS(drawn)
    assert len({tuple(s) for s in schedules}) > 2, "the pictures differ"
    assert {n for s in schedules for n in s} == {1, 4, 9}
    for b, schedule in enumerate(schedules):
        changes = [(after[b] - before[b]).abs().mean().item() for before, after in pairwise(trail)]
        assert schedule == numbers(SWITCHING, changes[:-1])


@pytest.mark.parametrize(("sampler", "scale"), [("ode", 3.0), ("sde", 1.0)])
def test_a_picture_does_not_depend_on_its_batch(model, sampler, scale):
    """Alone, in another order, and in a batch that is divided by the numbers."""

    def drawn(*pictures: int) -> Generated:
        return draw(model, SWITCHING, pictures, sampler, keep_masks=True, guidance=Guidance(scale, (0.0, 0.7)))

    whole = drawn(0, 1, 2, 3)
    assert len({tuple(row) for row in mediators_BS(whole)}) > 1
    for some in ([1], [3], [3, 1], [2, 0, 1]):
        part = drawn(*some)
        assert mediators_BS(part) == [mediators_BS(whole)[b] for b in some]
        for name in ("latent_BCHW", "masks_BSKN"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name)[some], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", [None, SWITCHING])
def test_two_drawings_are_equal_bit_for_bit(model, rule):
    first, again = (draw(model, rule, keep_masks=True, skip=Skip(0.8), sampler="sde") for _ in range(2))
    assert first.latent_BCHW.isfinite().all()
    assert torch.equal(first.latent_BCHW, again.latent_BCHW)
    assert first.masks_BSKN is not None and torch.equal(first.masks_BSKN, again.masks_BSKN)
    assert first.budgets_SB == again.budgets_SB


@pytest.mark.parametrize("unit", ["token", "layer"])
def test_the_work_of_a_divided_batch_is_the_sum_of_its_parts(model, unit):
    """Against pictures drawn alone, and against the tokens that the FFNs were given."""
    given: list[list[int]] = [[0] * BOTH.depth for _ in range(8)]
    step = 0

    def count(block: int, tokens: Tensor) -> None:
        given[step][block] += tokens.flatten(0, -2).shape[0]

    def on_step(i: int, timestep: Tensor, latent: Tensor) -> Tensor:
        nonlocal step
        step = min(i + 1, 7)
        return latent

    skip = Skip(0.88, unit)
    hooks = [
        block.ffn.register_forward_pre_hook(lambda m, args, k=k: count(k, args[0]))
        for k, block in enumerate(model.blocks)
    ]
    whole = draw(model, SWITCHING, skip=skip, on_step=on_step)
    for hook in hooks:
        hook.remove()
    alone = [draw(model, SWITCHING, [i], skip=skip).work for i in range(4)]
    assert whole.work is not None
    assert whole.work.kept_SK.tolist() == given
    # A mask within rounding of the threshold may fall on the other side in another batch.
    assert (whole.work.kept_SK - sum(work.kept_SK for work in alone)).abs().max() <= 1
    assert torch.equal(whole.work.tokens_SK, sum(work.tokens_SK for work in alone))
    assert 0 < whole.work.kept_SK.sum() < whole.work.tokens_SK.sum()


def test_a_step_can_stop_it_or_give_other_latents(model):
    """The changes are those of the latents that the sampling goes on with."""
    stopped = draw(model, SWITCHING, on_step=lambda i, timestep, latent: None if i == 2 else latent)
    assert [len(row) for row in mediators_BS(stopped)] == [3] * 4
    start = start_noise(range(4), SIZE)
    still = draw(model, SWITCHING, on_step=lambda i, timestep, latent: start + (i + 1 if i < 4 else 4))
    assert mediators_BS(still)[0][-3:] == [9, 9, 9], "it stands still from the fifth step on"
