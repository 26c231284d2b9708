"""Every choice beside every other: all learn, and none depends on how it is computed.

Letters: B images, N tokens, K blocks.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from backbones import predict
from torch import Tensor

from pretrain.models import ComputeBudget, DiT, DiTConfig, PackedText, Skip
from pretrain.models.focusdit.mask import dropout_factors
from pretrain.models.mixers.flexdit import FlexDiTSection
from pretrain.models.mixers.mediators import MediatorsSection

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = DiTConfig(
    width=24,
    heads=2,
    depth=6,
    patch=2,
    latent_channels=3,
    text_width=10,
    mediators=MediatorsSection((1, 4)),
    flexdit=FlexDiTSection(split=(1, 1, 1, 1), sparsity=(0.3, 0.8)),
    mask_hidden=(16, 8),
)
MASKS, FFNS = ("none", "adaln_single", "release"), ("uniform", "shared", "tapered")
NEIGHBOURS = list(product(("full", "mediators"), ("dense", "flexdit")))
GRID = (3, 5)  # not square
SPARSE = [1, 2]  # the blocks on FlexDiT's sparse grid


def build(mask: str, ffn: str, attention: str, density: str) -> DiT:
    """A model in fp64 with random parameters, as after some training: nothing is 0."""
    torch.manual_seed(0)
    config = replace(SMALL, mask=mask, ffn=ffn, attention=attention, density=density)
    if density == "dense":
        config = replace(config, depth=2)
    model = DiT(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("last.linear.bias"):
                parameter.zero_()
    return model


def inputs() -> tuple[Tensor, Tensor, PackedText]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 3, GRID[0] * 2, GRID[1] * 2, dtype=torch.float64, generator=generator)
    texts = [torch.randn(n, 10, dtype=torch.float64, generator=generator) for n in (5, 3)]
    return latent, torch.tensor([400.0, 420.0]), PackedText.pack(texts)


def keep_of(model: DiT) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    uniform = torch.rand(2, model.config.depth * GRID[0] * GRID[1], generator=generator)
    return dropout_factors(uniform, model.config.depth, 0.3)


def budgets(model: DiT) -> list[ComputeBudget]:
    """One for each number of mediators."""
    config = model.config
    rest = {"flexdit": 2} if config.density == "flexdit" else {}
    if config.attention != "mediators":
        return [ComputeBudget.of(**rest)]
    return [ComputeBudget.of(mediators=n, **rest) for n in config.mediators.numbers]


def gradients(model: DiT, keep: Tensor | None, budget: ComputeBudget) -> list[Tensor | None]:
    model.zero_grad(set_to_none=True)
    predict(model, *inputs(), keep_KBN=keep, budget=budget).sample_BCHW.square().mean().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(("attention", "density"), NEIGHBOURS)
@pytest.mark.parametrize(("mask", "ffn"), product(MASKS, FFNS))
def test_every_parameter_learns(mask, ffn, attention, density):
    """Each number of mediators has tables of its own."""
    model = build(mask, ffn, attention, density)
    for budget in budgets(model):
        predict(model, *inputs(), budget=budget).sample_BCHW.square().mean().backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    # A softmax over one mediator is 1 whatever its bias.
    assert still == {n for n, _ in model.named_parameters() if ".spread_bias.1." in n}


@pytest.mark.parametrize(("attention", "density"), NEIGHBOURS)
@pytest.mark.parametrize(("mask", "ffn"), [("none", "uniform"), ("adaln_single", "shared"), ("release", "tapered")])
def test_recompute_changes_no_gradient(mask, ffn, attention, density):
    """Also with dropout."""
    model = build(mask, ffn, attention, density)
    keep, budget = None if mask == "none" else keep_of(model), budgets(model)[-1]
    kept = gradients(model, keep, budget)
    model.recompute = True
    for before, after in zip(kept, gradients(model, keep, budget), strict=True):
        if before is None or after is None:
            assert before is after, "other numbers' tables have no gradient"
        else:
            torch.testing.assert_close(before, after, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(("attention", "density"), NEIGHBOURS)
@pytest.mark.parametrize("mask", MASKS[1:])
def test_masks_are_of_all_tokens_and_dropped_where_they_are_made(mask, attention, density):
    model = build(mask, "uniform", attention, density)
    K, N = model.config.depth, GRID[0] * GRID[1]
    for keep in (None, keep_of(model)):
        got = predict(model, *inputs(), keep_KBN=keep)
        assert got.masks_KBN.shape == (K, 2, N)
        for block, (mask_BN, grid) in enumerate(got.masks):
            on_sparse = density == "flexdit" and block in SPARSE
            assert (grid != GRID) == on_sparse
            zero = torch.zeros_like(mask_BN) if keep is None else keep[block, :, : mask_BN.shape[1]] == 0
            assert torch.equal(mask_BN == 0, zero.bool())


@torch.no_grad()
@pytest.mark.parametrize("unit", ["token", "layer"])
@pytest.mark.parametrize(("attention", "density"), NEIGHBOURS)
def test_skipping_leaves_out_what_the_masks_on_each_grid_say(attention, density, unit):
    model, (latent, timestep, text) = build("release", "shared", attention, density), inputs()
    plain = predict(model, latent, timestep, text)
    skipping = predict(model, latent, timestep, text, Skip(0.0, unit))
    torch.testing.assert_close(skipping.sample_BCHW, plain.sample_BCHW)
    judged = torch.cat([m.flatten() if unit == "token" else m.mean(-1) for m, _ in plain.masks])
    skip, rows = Skip(judged.quantile(0.4).item(), unit), [0] * model.config.depth
    for i, block in enumerate(model.blocks):
        block.ffn.register_forward_pre_hook(lambda _, a, i=i: rows.__setitem__(i, a[0].flatten(0, -2).shape[0]))
    got = predict(model, latent, timestep, text, skip)
    kept = [
        sum(
            int((image > skip.threshold).sum()) if unit == "token" else len(image) * int(image.mean() >= skip.threshold)
            for image in m
        )
        for m, _ in got.masks
    ]
    assert rows == kept
    assert 0 < sum(rows) < sum(m.numel() for m, _ in got.masks)
    assert not torch.allclose(got.sample_BCHW, plain.sample_BCHW)


@torch.no_grad()
@pytest.mark.parametrize("rotary", ["halves", "thirds"])
@pytest.mark.parametrize(("attention", "density"), NEIGHBOURS)
def test_a_result_does_not_depend_on_neighbours(attention, density, rotary):
    model, (latent, timestep, text) = build("adaln_single", "shared", attention, density), inputs()
    other = DiT(replace(model.config, rotary=rotary, absolute="sincos", position_scale=(2.0, 0.5))).double()
    other.load_state_dict(model.state_dict())
    together = predict(other, latent, timestep, text)
    assert not torch.allclose(together.sample_BCHW, predict(model, latent, timestep, text).sample_BCHW)
    for b in range(2):
        alone = predict(other, latent[b : b + 1], timestep[b : b + 1], PackedText.pack([text.captions()[b]]))
        torch.testing.assert_close(alone.sample_BCHW, together.sample_BCHW[b : b + 1])
        torch.testing.assert_close(alone.masks_KBN, together.masks_KBN[:, b : b + 1])


@pytest.mark.parametrize(("attention", "density"), NEIGHBOURS)
def test_it_trains_in_bf16(attention, density):
    exact, half = (build("adaln_single", "shared", attention, density) for _ in range(2))
    half.to(torch.bfloat16)
    latent, timestep, text = inputs()
    budget = budgets(exact)[-1]
    with torch.no_grad():
        expected = predict(exact, latent, timestep, text, budget=budget).sample_BCHW
    got = predict(half, latent.bfloat16(), timestep, text.to("cpu", torch.bfloat16), budget=budget).sample_BCHW
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() < 0.2 * expected.norm()
    got.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)


@pytest.mark.parametrize("dropped", [(0,), (1, 3), (5,)])
def test_ffns_are_pruned_from_blocks_of_every_role(dropped):
    whole = build("release", "shared", "full", "flexdit")
    pruned = DiT(replace(whole.config, removed_ffns=dropped)).double()
    rest = pruned.load_state_dict(whole.state_dict(), strict=False)
    assert not rest.missing_keys
    assert {int(name.split(".")[1]) for name in rest.unexpected_keys} == set(dropped)
    for block in dropped:
        whole.blocks[block]._vocabulary = lambda shared: torch.zeros_like
    torch.testing.assert_close(predict(pruned, *inputs()).sample_BCHW, predict(whole, *inputs()).sample_BCHW)


def test_only_the_neighbours_depend_on_time():
    found = {(a, d): build("none", "uniform", a, d).config.open_methods for a, d in NEIGHBOURS}
    assert [pair for pair, methods in found.items() if not methods] == [("full", "dense")]
