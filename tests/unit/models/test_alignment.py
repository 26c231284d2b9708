"""Alignment with a vision encoder's features: a plain loop over tokens, end points, FLOPs by torch's counter, what is refused.

Letters: B images, N tokens, n those that a block computes, D width, F width of the features; h, w vectors.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbones import build, predict
from support import complaint
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data_prep.encoders import DOWNSAMPLE, FEATURE_CELL
from data_prep.schema import Card
from pretrain.checkpoint.restore import map_parameters
from pretrain.config import AlignmentSection, OptimizerSection, load
from pretrain.data.loader import check_fits
from pretrain.diffusion import kept_tokens
from pretrain.distributed.optimizer import build_optimizer
from pretrain.loss import model_to_train
from pretrain.models import DiT, DiTConfig, PackedText
from pretrain.models.alignment import CELL, Alignment, Projection
from pretrain.models.cost import training_flops, training_phases
from pretrain.models.routing import Route, Routing

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = DiTConfig(
    width=24, heads=2, depth=5, patch=2, latent_channels=3, text_width=10, mask="adaln_single", mask_hidden=(16, 8)
)
ALIGNMENT = Alignment(0.5, block=2, hidden=16, until=1.0)
ROUTINGS = {
    "none": None,
    "tread around the block": Routing("tread", 0.6, 1, 4, 1.0),
    "tread before the block": Routing("tread", 0.6, 0, 2, 1.0),
    "tread after the block": Routing("tread", 0.6, 3, 5, 1.0),
    "deferred masking": Routing("deferred_masking", 0.6, 1, 5, 1.0),
}
WIDTH = 7  # of the features


def aligned(config: DiTConfig, alignment: Alignment = ALIGNMENT) -> DiT:
    model = build(config)
    model.alignment = Projection(config.width, alignment, WIDTH)
    return model.double()


def inputs(patch: int) -> tuple[Tensor, Tensor, PackedText]:
    """Latents of 3 × 5 tokens."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 3, 3 * patch, 5 * patch, dtype=torch.float64, generator=generator)
    texts = [torch.randn(n, 10, dtype=torch.float64, generator=generator) for n in (5, 3)]
    return latent, torch.tensor([400.0, 420.0]), PackedText.pack(texts)


def features(patch: int) -> Tensor:
    shape = (2, 3 * patch // CELL, 5 * patch // CELL, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)).half()


def route_of(routing: Routing | None) -> Route | None:
    if routing is None:
        return None
    return routing.route(kept_tokens([7, 8], 15, routing.kept(15), torch.device("cpu")))


def loss_of(model: DiT, routing: Routing | None) -> Tensor:
    route, patch = route_of(routing), model.config.patch
    prediction = predict(model, *inputs(patch), route=route, align=True)
    assert prediction.aligned_BnF is not None
    return ALIGNMENT.loss(prediction.aligned_BnF, features(patch), patch, route)


def reference(model: DiT, routing: Routing | None) -> Tensor:
    """One token after the other; the block's own output, as a hook sees it."""
    seen: list[Tensor] = []
    hook = model.block(ALIGNMENT.block).register_forward_hook(lambda _, __, state: seen.append(state.x_BND))
    route, patch, projection = route_of(routing), model.config.patch, model.alignment
    assert projection is not None
    predict(model, *inputs(patch), route=route)
    hook.remove()
    first, second, last = projection.layers[::2]
    given, side, cosines = features(patch), patch // CELL, []
    for b in range(2):
        inside = route is not None and route.first <= ALIGNMENT.block < route.last
        places = route.kept_Bn[b].tolist() if route is not None and inside else range(15)
        assert seen[0].shape[1] == len(places)
        for k, place in enumerate(places):
            x = first(seen[0][b, k])
            x = second(x * torch.sigmoid(x))
            x = last(x * torch.sigmoid(x))
            row, column = divmod(place, 5)
            cells = [given[b, row * side + i, column * side + j].double() for i in range(side) for j in range(side)]
            mean = sum(cells) / len(cells)
            cosines.append((x * mean).sum() / x.norm() / mean.norm())
    return -torch.stack(cosines).mean()


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_loss_is_the_mean_negative_cosine_of_a_plain_loop(name: str, patch: int) -> None:
    model, routing = aligned(replace(SMALL, patch=patch)), ROUTINGS[name]
    one, other = loss_of(model, routing), reference(model, routing)
    torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(one, parameters, allow_unused=True),
        torch.autograd.grad(other, parameters, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_recomputed_blocks_give_the_same_tokens() -> None:
    model = aligned(SMALL)
    one = loss_of(model, ROUTINGS["none"])
    model.recompute = True
    assert torch.equal(loss_of(model, ROUTINGS["none"]), one)


def test_the_backbone_is_the_same_with_and_without() -> None:
    """Its first weights, and its prediction where the tokens are not asked for."""
    words = ["data.path=/set", "model.preset=dit_tiny_deep"]
    card: Any = SimpleNamespace(features={"width": WIDTH})
    torch.manual_seed(0)
    plain = model_to_train(load("demo_256", words)[0], card)
    torch.manual_seed(0)
    more = model_to_train(load("demo_256", [*words, "alignment.weight=0.5", "alignment.hidden=32"])[0], card)
    assert plain.alignment is None and more.alignment is not None
    extra = more.state_dict().keys() - plain.state_dict().keys()
    assert extra == {f"alignment.layers.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert list(more.state_dict())[: len(plain.state_dict())] == list(plain.state_dict())
    assert all(torch.equal(more.state_dict()[name], values) for name, values in plain.state_dict().items())

    model = aligned(SMALL)
    prediction = predict(model, *inputs(2))
    model.alignment = None
    assert prediction.aligned_BnF is None
    assert torch.equal(predict(model, *inputs(2)).sample_BCHW, prediction.sample_BCHW)


def test_muon_leaves_the_projection_to_adamw() -> None:
    model = aligned(SMALL)
    groups = build_optimizer(model, OptimizerSection(name="muon")).param_groups
    (muon,) = (group["params"] for group in groups if group.get("muon"))
    assert model.alignment is not None
    own = {id(p) for p in model.alignment.parameters()}
    assert not own & {id(p) for p in muon} and own <= {id(p) for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", ROUTINGS)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    model, routing = aligned(SMALL), ROUTINGS[name]

    def counted(align: bool) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            predict(model, *inputs(2), route=route_of(routing), align=align)
        return counter.get_total_flops()

    more = [training_flops(SMALL, 2, (3, 5), 8, None, routing, alignment, WIDTH) for alignment in (ALIGNMENT, None)]
    assert 3 * (counted(True) - counted(False)) == more[0] - more[1] > 0


def test_phases_of_a_training() -> None:
    routing, alignment = replace(ROUTINGS["tread around the block"], until=0.9), replace(ALIGNMENT, until=0.3)
    whole = (
        (SMALL, 1, (3, 5), 8, None, *methods, WIDTH)
        for methods in ((routing, alignment), (routing, None), (None, None))
    )
    expected = [(end, training_flops(*words)) for end, words in zip((3, 9, 10), whole, strict=True)]
    assert training_phases(SMALL, (3, 5), 8, 10, routing, alignment, WIDTH) == expected
    assert training_phases(SMALL, (3, 5), 8, 10, None, None, 0) == [(10, expected[2][1])]
    at_once = training_phases(SMALL, (3, 5), 8, 10, None, replace(ALIGNMENT, until=1.0), WIDTH)
    assert [end for end, _ in at_once] == [10] and at_once[0][1] > expected[2][1]


# ---- what is refused, and what goes ----


def test_the_cell_is_that_of_data_prep() -> None:
    assert CELL * DOWNSAMPLE == FEATURE_CELL


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["alignment.block=28"], "alignment.block: 28 must be below 28, the model's depth"),
        (["model.patch=1"], "alignment.weight: model.patch=1 must be divisible by 2"),
        (
            ["model.density=flexdit", "alignment.block=14"],
            "alignment.block: with model.density=flexdit block 14 has fewer",
        ),
        (["alignment.until=0"], "alignment.until: Input should be greater than 0"),
        (["alignment.weight=-1"], "alignment.weight: Input should be greater than or equal to 0"),
    ],
)
def test_contradictions_are_one_line(words: list[str], line: str) -> None:
    (found,) = complaint("data.path=/set", "alignment.weight=0.5", *words, name="stage1_256")
    assert found.startswith(line), found


@pytest.mark.parametrize(
    "words",
    [
        ["model.density=flexdit", "alignment.block=1"],
        ["model.attention=mediators"],
        ["routing.name=tread"],
        ["routing.name=deferred_masking"],
    ],
)
def test_methods_that_go_with_it(words: list[str]) -> None:
    config = load("stage1_256", ["data.path=/set", "alignment.weight=0.5", *words])[0]
    assert config.alignment.build(config.model.backbone()) is not None


def test_the_default_block_is_repas() -> None:
    for depth, block in ((28, 7), (12, 2), (2, 0)):
        built = AlignmentSection(weight=0.5).build(replace(SMALL, depth=depth))
        assert built is not None and built.block == block
    assert AlignmentSection().build(SMALL) is None


def test_a_data_set_without_features_is_one_line_with_the_mend() -> None:
    config = load("demo_256", ["data.path=/set", "alignment.weight=0.5"])[0]
    backbone = config.model.backbone()
    vae = {"name": "tiny", "channels": backbone.latent_channels, "downsample": 8}
    sets = {"a/256": {"source": "a", "resolutions": [256], "bucket": None}}
    card = Card({"name": "tiny", "width": backbone.text_width}, vae, 300, "mean", [256], complete=True, sets=sets)
    with pytest.raises(
        ValueError, match=r"alignment.weight: 0.5 needs .* /set holds none; encode it with --features dinov2-base"
    ):
        check_fits(card, config, backbone, 4)
    check_fits(
        replace(card, features={"name": "tiny", "width": 8, "cell": 16, "dtype": "float16"}), config, backbone, 4
    )


def test_a_next_stage_takes_leaves_or_begins_the_projection() -> None:
    """As features are there or not, or of another width."""
    own = {"final.proj.weight": (3, 4)}
    projection = {"alignment.layers.0.weight": (16, 4), "alignment.layers.4.weight": (7, 16)}
    wider = projection | {"alignment.layers.4.weight": (9, 16)}
    same = map_parameters(own | projection, own | projection)
    assert same.identical
    new = map_parameters(own | projection, own)
    assert new.fresh == list(projection) and not new.problems and not new.left
    left = map_parameters(own, own | projection)
    assert left.left == list(projection) and not left.problems and not left.fresh
    other = map_parameters(own | wider, own | projection)
    assert other.fresh == ["alignment.layers.4.weight"] and not other.problems and not other.identical
