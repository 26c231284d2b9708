"""Token routing against a plain loop over samples, its end points, FLOPs by torch's counter, and what is refused.

Letters: B images, K blocks, N tokens, n kept ones, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from backbones import build, predict
from support import ROOT, complaint
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import RoutingSection, load
from pretrain.diffusion import kept_tokens, measure
from pretrain.diffusion.objective import NoisySample
from pretrain.models import ComputeBudget, DiT, DiTConfig, PackedText, preset
from pretrain.models.block import Shared
from pretrain.models.cost import CAPTION, count_flops, training_flops
from pretrain.models.embeddings import Rotary
from pretrain.models.focusdit.mask import dropout_factors
from pretrain.models.mixers.base import Positions, TokenState
from pretrain.models.routing import Route, Routing

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = DiTConfig(width=24, heads=2, depth=5, patch=2, latent_channels=3, text_width=10, mask_hidden=(16, 8))
KINDS = list(product(("none", "adaln_single", "release"), ("uniform", "shared", "tapered")))
GRID = (3, 5)  # not square
TREAD = Routing("tread", 0.6, 1, 4, 1.0)
ROUTINGS = {
    "tread": TREAD,
    "tread, from the patches to the end": replace(TREAD, first=0, last=5),
    "sprint": Routing("sprint", 0.6, 1, 4, 1.0),
    "sprint, from the patches to the end": Routing("sprint", 0.6, 0, 5, 1.0),
    "deferred masking": Routing("deferred_masking", 0.6, 2, 5, 1.0),
}


def shape_for(routing: Routing, **changes: Any) -> DiTConfig:
    """The small backbone, for sprint with its fusion."""
    fusion = (routing.first, routing.last) if routing.name == "sprint" else None
    return replace(SMALL, fusion=fusion, **changes)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, PackedText]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 3, GRID[0] * 2, GRID[1] * 2, dtype=dtype, generator=generator)
    texts = [torch.randn(n, 10, dtype=dtype, generator=generator) for n in (5, 3)]
    return latent, torch.tensor([400.0, 420.0]), PackedText.pack(texts)


def dropout(depth: int) -> Tensor:
    uniform = torch.rand(2, depth * 15, generator=torch.Generator().manual_seed(2))
    return dropout_factors(uniform, depth, 0.3)


def route_of(routing: Routing) -> Route:
    return routing.route(kept_tokens([7, 8], 15, routing.kept(15), torch.device("cpu")))


def target() -> NoisySample:
    latent = inputs()[0]
    return NoisySample(latent, torch.zeros(2), torch.randn(latent.shape, generator=torch.Generator().manual_seed(3)))


def gradients(model: DiT, loss: Tensor) -> list[Tensor]:
    return [g for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if g is not None]


@dataclass
class Reference:
    """One sample after the other, one token's value after the other: what the paper says, as a plain loop."""

    loss: Tensor
    masks_K: Tensor | None


def reference(model: DiT, routing: Routing, keep_KBN: Tensor | None) -> Reference:
    config, (latent, timestep, text) = model.config, inputs()
    losses, masks = [], []
    for b in range(2):
        kept = sorted(kept_tokens([7, 8][b : b + 1], 15, routing.kept(15), torch.device("cpu"))[0].tolist())
        conditioning = model.condition(timestep[b : b + 1], PackedText.pack([text.captions()[b]]))
        every = model._positions(GRID, ComputeBudget(), latent)
        few = Positions(Rotary(every.tokens.cos_Nd[kept], every.tokens.sin_Nd[kept], every.tokens.parts), {})
        x = model.patch_embed(latent[b : b + 1])
        m, bypassing, own = torch.ones(1, 15, 1, dtype=x.dtype), None, []
        for k in range(config.depth):
            if k == routing.first:
                bypassing, x, m = (x, m), x[:, kept], m[:, kept]
            if k == routing.last:
                x, m = back(model, bypassing, (x, m), kept)
            inside = routing.first <= k < routing.last
            keep = None if keep_KBN is None else keep_KBN[k, b : b + 1].to(x.dtype)
            keep = keep[:, kept] if keep is not None and inside else keep
            shared = Shared(few if inside else every, model.shared_expert, None)
            after = model.block(k)(TokenState(x, GRID, m), conditioning.for_block(k), shared, keep)
            x, m = after.x_BND, after.mask_BN1
            own.append(m.mean())
        masks.append(torch.stack(own))
        if routing.last == config.depth:
            x, m = back(model, bypassing, (x, m), kept)
        prediction = model.final(TokenState(x, GRID, m), conditioning.time_BD)
        error = (prediction.float() - target().target_BCHW[b]).square().mean((0, 1))
        if routing.name == "deferred_masking":
            patches = [error[2 * r : 2 * r + 2, 2 * c : 2 * c + 2] for r, c in (divmod(i, GRID[1]) for i in kept)]
            error = torch.stack(patches)
        losses.append(error.mean())
    return Reference(torch.stack(losses).mean(), None if config.mask == "none" else torch.stack(masks).mean(0))


def back(model: DiT, before, after, kept: list[int]) -> list[Tensor]:
    """All tokens where the left-out ones come back: as they were, or by SPRINT's fusion, token by token."""
    x, m = together(before, after, kept)
    if model.fusion is None:
        return [x, m]
    f, s = model.fusion, before[0]
    added = [
        (after[0][:, kept.index(i)] - s[:, i]) @ f.added.weight.T if i in kept else f.left_out[None] for i in range(15)
    ]
    return [s @ f.before.weight.T + f.before.bias + torch.stack(added, dim=1), m]


def together(before, after, kept: list[int]) -> list[Tensor]:
    """All tokens: the kept ones' values after, the others' before."""
    columns = [
        [a[:, kept.index(i)] if i in kept else b[:, i] for i in range(15)] for b, a in zip(before, after, strict=True)
    ]
    return [torch.stack(column, dim=1) for column in columns]


def routed_loss(model: DiT, routing: Routing, keep_KBN: Tensor | None) -> tuple[Tensor, Tensor | None]:
    route = route_of(routing)
    prediction = predict(model, *inputs(), keep_KBN=keep_KBN, route=route)
    loss = measure(prediction.sample_BCHW, target(), routing.judged(route, GRID, model.config.patch))
    statistics = prediction.mask_statistics_3KB()
    return loss.mean, None if statistics is None else statistics[0].mean(1)


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=list(ROUTINGS))
@pytest.mark.parametrize(("mask", "ffn"), KINDS)
def test_a_plain_loop_gives_the_same_loss_gradients_and_masks(mask: str, ffn: str, routing: Routing) -> None:
    """A left-out token comes back as it was before `first`, with the mask of the block before; dropout is its own token's."""
    model = build(shape_for(routing, mask=mask, ffn=ffn)).double()
    keep = None if mask == "none" else dropout(5)
    expected = reference(model, routing, keep)
    loss, masks = routed_loss(model, routing, keep)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=0)
    if mask == "none":
        assert masks is None
    else:
        torch.testing.assert_close(masks, expected.masks_K.float())
    ones, others = gradients(model, loss), gradients(model, expected.loss)
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)
    plain = predict(model, *inputs(), keep_KBN=keep).sample_BCHW
    assert (measure(plain, target()).mean - loss).abs() > 1e-4 * loss


def test_a_left_out_tokens_state_is_the_one_before_first_to_the_bit() -> None:
    model, states = build(replace(SMALL, mask="adaln_single")), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    route = route_of(TREAD)
    predict(model, *inputs(torch.float32), route=route)
    assert [state.x_BND.shape[1] for state in states] == [15, 6, 6, 6, 15]
    before = []
    model.blocks[0].register_forward_hook(lambda *given: before.append(given[-1]))
    predict(model, *inputs(torch.float32))
    left = torch.ones(2, 15, dtype=torch.bool).scatter_(1, route.kept_Bn, False)
    assert torch.equal(states[4].x_BND[left], before[0].x_BND[left])
    assert torch.equal(states[4].mask_BN1[left], before[0].mask_BN1[left])
    assert (states[4].x_BND[~left] != before[0].x_BND[~left]).any(-1).all()


def test_with_deferred_masking_left_out_patches_are_no_part_of_the_loss() -> None:
    model, routing = build(SMALL), ROUTINGS["deferred masking"]
    route = route_of(routing)
    judged = routing.judged(route, GRID, 2)
    assert judged.sum((1, 2)).tolist() == [6 * 4, 6 * 4] and TREAD.judged(route, GRID, 2) is None
    prediction = predict(model, *inputs(torch.float32), route=route).sample_BCHW
    sample = target()
    changed = replace(sample, target_BCHW=sample.target_BCHW + 100 * (1 - judged[:, None]))
    assert torch.equal(measure(prediction, sample, judged).mean, measure(prediction, changed, judged).mean)
    (gradient,) = torch.autograd.grad(measure(prediction, sample, judged).mean, prediction)
    assert torch.equal((gradient != 0).any(1).float(), judged)


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=list(ROUTINGS))
def test_recompute_changes_no_gradient(routing: Routing) -> None:
    model = build(shape_for(routing, mask="release", ffn="shared")).double()
    kept = gradients(model, routed_loss(model, routing, dropout(5))[0])
    model.recompute = True
    again = gradients(model, routed_loss(model, routing, dropout(5))[0])
    for one, other in zip(kept, again, strict=True):
        assert torch.equal(one, other)


def test_all_tokens_kept_in_place_is_the_plain_pass() -> None:
    model = build(replace(SMALL, mask="adaln_single", ffn="shared"))
    every = Route(torch.arange(15).expand(2, -1), 1, 4)
    routed, plain = predict(model, *inputs(torch.float32), route=every), predict(model, *inputs(torch.float32))
    assert torch.equal(routed.sample_BCHW, plain.sample_BCHW)
    assert torch.equal(routed.masks_KBN, plain.masks_KBN)


# ---- cost ----


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=list(ROUTINGS))
@pytest.mark.parametrize(("mask", "ffn"), [("none", "uniform"), ("release", "shared"), ("adaln_single", "tapered")])
def test_flops_are_those_of_torchs_counter(mask: str, ffn: str, routing: Routing) -> None:
    config = shape_for(routing, mask=mask, ffn=ffn)
    model, (latent, timestep, _) = DiT(config), inputs(torch.float32)
    text = PackedText.pack([torch.zeros(5, 10, requires_grad=True) for _ in range(2)])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predict(model, latent.requires_grad_(), timestep, text, route=route_of(routing)).sample_BCHW.sum().backward()
    sinusoids = 2 * 2 * 256 * config.width  # the only product whose input needs no gradient
    counted = training_flops(config, 2, GRID, 10, None, routing)
    assert counter.get_total_flops() == counted - sinusoids
    assert counted < 0.8 * training_flops(config, 2, GRID, 10)


@pytest.mark.parametrize(
    ("row", "routing"),
    [
        ("`tread`, half of the tokens, blocks 2 to 25", Routing("tread", 0.5, 2, 26, 0.9)),
        ("`tread`, three quarters, blocks 2 to 25", Routing("tread", 0.75, 2, 26, 0.9)),
        ("`sprint`, three quarters, blocks 2 to 25", Routing("sprint", 0.75, 2, 26, 0.9)),
        ("`deferred_masking`, half, blocks 2 to 27", Routing("deferred_masking", 0.5, 2, 28, 0.9)),
        ("`deferred_masking`, three quarters, blocks 4 to 27", Routing("deferred_masking", 0.75, 4, 28, 0.9)),
    ],
)
def test_flops_of_docs_train_for_less(row: str, routing: Routing) -> None:
    backbone = preset("focusdit_1b_shared2d")

    def relative(side: int) -> str:
        fused = replace(backbone, fusion=(2, 26) if routing.name == "sprint" else None)
        some = count_flops(fused, (side, side), CAPTION, None, routing).total
        return f"{some / count_flops(backbone, (side, side), CAPTION).total:.2f}"

    text = (ROOT / "docs/train_for_less.md").read_text(encoding="utf-8")
    assert f"| {row} | {relative(16)} | {relative(32)} |\n" in text


def test_flops_of_a_share_of_0_are_the_plain_ones() -> None:
    assert count_flops(SMALL, GRID, 7, None, replace(TREAD, share=0.0)) == count_flops(SMALL, GRID, 7)


# ---- the config ----


def test_numbers_of_tokens_and_steps() -> None:
    assert [replace(TREAD, share=share).kept(15) for share in (0.0, 0.5, 0.6, 0.999999)] == [15, 8, 6, 1]
    assert [TREAD.tokens(block, 15) for block in range(5)] == [15, 6, 6, 6, 15]
    assert [replace(TREAD, until=until).steps(10) for until in (0.0, 0.7, 1.0)] == [0, 7, 10]
    assert replace(TREAD, share=0.0).steps(10) == 0


def test_sections_to_routings() -> None:
    assert RoutingSection().build(SMALL) is None
    assert RoutingSection(name="tread").build(SMALL) == Routing("tread", 0.5, 2, 3, 0.9)
    assert RoutingSection(name="tread", first=1, last=5).build(SMALL) == Routing("tread", 0.5, 1, 5, 0.9)
    fused = replace(SMALL, fusion=(1, 4))
    assert RoutingSection(name="sprint", share=0.75).build(fused) == Routing("sprint", 0.75, 1, 4, 0.9)
    assert RoutingSection(name="deferred_masking", share=0.75).build(SMALL) == Routing(
        "deferred_masking", 0.75, 2, 5, 0.9
    )


DEEP = ["data.path=/set", "model.preset=dit_tiny_deep"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["name=tread", "first=5", "last=5"], "routing.first: 5 (and last: 5) must be blocks with 0 ≤ first < last ≤ 8, "),
        (["name=tread", "last=9"], "routing.first: 2 (and last: 9) must be blocks with 0 ≤ first < last ≤ 8, "),
        (["name=deferred_masking", "first=8"], "routing.first: 8 (and last: 8) must be blocks with "),
        (["name=deferred_masking", "last=6"], "routing.last: 6 is of tread; deferred_masking leaves tokens out to the end: "),
        (["name=tread", "share=1"], "routing.share: Input should be less than 1, not 1"),
        (["name=tread", "share=-0.1"], "routing.share: Input should be greater than or equal to 0, not -0.1"),
        (["name=tread", "until=1.5"], "routing.until: Input should be less than or equal to 1, not 1.5"),
        (["name=sprint"], "routing.name: sprint needs the projection that joins both paths; add it to the model by model.fus"),
        (["name=dream"], "routing.name: Input should be 'none', 'tread', 'sprint' or 'deferred_masking', not 'dream'"),
    ],
)  # fmt: skip
def test_refusals(words: list[str], said: str) -> None:
    (line,) = complaint(*DEEP, *(f"routing.{word}" for word in words))
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["routing.name=tread"], "routing.name: a model with model.fusion goes with sprint or none, not tread; "),
        (["routing.name=sprint", "routing.first=2"], "routing.first: 2 is of other methods; for sprint model.fusion says it: "),
        (["routing.name=sprint", "routing.last=6"], "routing.last: 6 is of other methods; for sprint model.fusion says it: "),
        (["model.density=flexdit"], "model.fusion: it goes with density=dense alone, not with flexdit; "),
        (["model.attention=mediators"], "model.fusion: it goes with attention=full alone, not with mediators; "),
        (["model.fusion=[6,2]"], "model.fusion: [6, 2] must be two blocks with 0 ≤ first < last ≤ 8, the depth, such as [2, 6]"),
        (["model.fusion=[2,9]"], "model.fusion: [2, 9] must be two blocks with 0 ≤ first < last ≤ 8, the depth, such as [2, 6]"),
    ],
)  # fmt: skip
def test_refusals_of_a_model_with_a_fusion(words: list[str], said: str) -> None:
    (line,) = complaint(*DEEP, "model.fusion=[2,6]", *words)
    assert line.startswith(said)


@pytest.mark.parametrize("field", ["density=flexdit", "attention=mediators"])
@pytest.mark.parametrize("name", ["tread", "deferred_masking"])
def test_methods_with_cells_are_refused(name: str, field: str) -> None:
    (line,) = complaint(*DEEP, f"routing.name={name}", f"model.{field}")
    assert line.startswith(f"routing.name: {name} does not go with model.{field}, whose cells ")
    assert load("demo_256", [*DEEP, f"model.{field}"])[0].routing.name == "none"
