"""What a model with other settings takes of a trained one: the plan, from shapes alone; tests/distributed runs it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pretrain.checkpoint.restore import map_parameters
from pretrain.models import DiT, DiTConfig
from pretrain.models.mixers.mediators import MediatorsSection

DENSE = DiTConfig(width=48, heads=2, depth=8, patch=2, latent_channels=3, text_width=20, mask_hidden=(8, 4))
MASKED = replace(DENSE, mask="adaln_single")


def shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in DiT(config).named_parameters()}


def made(here: DiTConfig, there: DiTConfig):
    return map_parameters(shapes(here), shapes(there))


def test_the_same_model_takes_all_as_it_was():
    found = made(MASKED, MASKED)
    assert found.identical and found.sources == {name: name for name in shapes(MASKED)}


def test_flexdit_from_a_dense_model():
    found = made(replace(MASKED, density="flexdit"), MASKED)
    assert not found.problems and not found.identical
    block = "blocks.0.self_attention"
    assert found.sources[f"{block}.value.weight"] == f"{block}.qkv.weight"
    assert found.sources["blocks.1.self_attention.qkv.weight"] == "blocks.1.self_attention.qkv.weight"
    assert found.fresh == [
        f"blocks.5.from_{which}.{what}" for which in ("sparse", "dense") for what in ("weight", "bias")
    ]
    assert found.left == []
    report = found.describe()
    assert report[0] == f"{len(shapes(MASKED)) - 2} of {len(shapes(MASKED)) + 4} parameters as they were"
    assert "blocks.*.self_attention.value.weight (1): the last third of qkv's" in report
    assert "blocks.*.from_dense.bias (1): new, from their own start" in report


def test_mediators_and_masks_from_a_plain_model():
    found = made(replace(MASKED, attention="mediators", mediators=MediatorsSection((4,))), DENSE)
    assert not found.problems
    kinds = {name.split(".", 2)[2].split(".")[0] for name in found.fresh}
    assert kinds == {"query_mask", "self_attention"}
    assert not any("qkv" in name or "out" in name for name in found.fresh)
    assert len(found.fresh) == len(
        shapes(replace(MASKED, attention="mediators", mediators=MediatorsSection((4,))))
    ) - len(shapes(DENSE))


def test_a_plain_model_from_one_with_mediators_leaves_them_behind():
    found = made(DENSE, replace(MASKED, attention="mediators", mediators=MediatorsSection((4,))))
    assert not found.problems and not found.fresh
    assert found.left and all(line.endswith("left behind") for line in found.describe()[1:])


@pytest.mark.parametrize(
    ("here", "problem"),
    [
        (replace(MASKED, width=96), "patch_embed.proj.weight: there (48, 12), here (96, 12)"),
        (replace(MASKED, ffn="shared"), "shared_expert.key.weight: there not there, here (96, 48)"),
        (replace(MASKED, depth=7), "blocks.7.scale_shift_table: there (6, 48), here not there"),
    ],
)
def test_other_sizes_are_refused(here, problem):
    assert problem in made(here, MASKED).problems


def test_dense_from_flexdit_lacks_queries_and_keys():
    problems = made(MASKED, replace(MASKED, density="flexdit")).problems
    assert "blocks.0.self_attention.qkv.weight: there not there, here (144, 48)" in problems
