"""A checkpoint put back into a real engine, and what a model with other settings takes of a trained one, by shapes.

tests/distributed does both in whole trainings.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engines import engine_of, tiny, train_steps
from torch import nn

from pretrain.checkpoint.restore import map_parameters, restore_weights, resume
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


def test_a_fusion_comes_and_goes():
    """A fresh one changes nothing (tests/unit/models/test_fusion.py)."""
    fused, parts = replace(MASKED, fusion=(2, 6)), ("before.weight", "before.bias", "added.weight", "left_out")
    found = made(fused, MASKED)
    assert not found.problems and sorted(found.fresh) == sorted(f"fusion.{part}" for part in parts)
    found = made(MASKED, fused)
    assert not found.problems and not found.fresh and sorted(found.left) == sorted(f"fusion.{part}" for part in parts)
    moved = made(replace(MASKED, fusion=(1, 7)), fused)
    assert not moved.problems and not moved.fresh, "the same parameters for other blocks"


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


def test_a_derived_parameter_takes_its_rows():
    """A pooling block's value is the last third of the trained qkv, row by row; fresh ones are left alone."""
    found = made(replace(MASKED, density="flexdit"), MASKED)
    trained = {name: torch.randn(shape) for name, shape in shapes(MASKED).items()}
    block = "blocks.0.self_attention"
    taken = found.take(f"{block}.value.weight", trained.__getitem__)
    assert taken is not None and torch.equal(taken, trained[f"{block}.qkv.weight"][2 * 48 :])
    assert found.take("blocks.5.from_dense.weight", trained.__getitem__) is None
    same = found.take("blocks.1.self_attention.qkv.weight", trained.__getitem__)
    assert same is trained["blocks.1.self_attention.qkv.weight"]


# ---- into an engine ----


def all_of(run) -> list[torch.Tensor]:
    """All that training goes on from."""
    moments = [m for kind in run.engine.moments().values() for m in kind]
    return [
        t.detach() for t in (*run.engine.masters, *run.ema.partitions["ema"], *moments, *run.engine.module.parameters())
    ]


def equal(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def test_a_resumed_run_goes_on_bit_for_bit(make_run):
    """Weights, average, moments and AdamW's count: two steps after it nothing differs from the uninterrupted run."""
    run, other = make_run("run"), make_run("other", seed=1)
    run.train(0, 1, 2)
    found = run.save(3)
    other.train(0)
    assert not equal(all_of(other), all_of(run))
    state = resume(found, other.engine, other.ema, {"seed": 3})
    assert state == found.run_state and (state.step, state.updates) == (3, 3)
    assert equal(all_of(other), all_of(run)) and other.engine.updates == 3
    for r in (run, other):
        r.train(3, 4)
    assert equal(all_of(other), all_of(run))


@pytest.mark.parametrize("data", [{"seed": 4}, {"seed": 3, "draws": {"a/256": 9}}, {"global_batch": 8}])
def test_another_data_order_is_refused(data, make_run):
    run = make_run()
    found, before = run.save(1), [t.clone() for t in all_of(run)]
    with pytest.raises(ValueError, match=r"was made with another data order.*init_from:\n  \w+: there ") as raised:
        resume(found, run.engine, run.ema, data)
    assert str(raised.value).count("\n") == 1, "only what differs is listed"
    assert equal(all_of(run), before)


def test_weights_alone(make_run):
    """Of another run: the masters and the average, with moments and count as in a fresh start."""
    run, other = make_run("run"), make_run("other", seed=1)
    run.train(0, 1)
    assert restore_weights(run.save(2), other.engine, other.ema, moments=False) == []
    assert equal([m.detach() for m in other.engine.masters], [m.detach() for m in run.engine.masters])
    assert equal(other.ema.partitions["ema"], run.ema.partitions["ema"])
    assert all(m.count_nonzero() == 0 for kind in other.engine.moments().values() for m in kind)
    assert other.engine.updates == 0


def test_an_average_that_the_other_run_does_not_have_starts_from_its_ema(make_run):
    run, other = make_run("run", more_averages=(0.05,)), make_run("other", seed=1, more_averages=(0.05, 0.2))
    run.train(0, 1, 2)
    lines = restore_weights(run.save(3), other.engine, other.ema, moments=False)
    assert lines == ["ema_0.2: from its ema, as it has none of this name"]
    assert list(other.ema.partitions) == ["ema", "ema_0.05", "ema_0.2"]
    for name, source in {"ema": "ema", "ema_0.05": "ema_0.05", "ema_0.2": "ema"}.items():
        assert equal(other.ema.partitions[name], run.ema.partitions[source])
    assert not equal(run.ema.partitions["ema"], run.ema.partitions["ema_0.05"])


class Related(nn.Module):
    """The tiny model's maps with a part of an optional name, and without the table."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.query_mask = nn.Linear(3, 5), nn.Linear(5, 2), nn.ModuleList([nn.Linear(2, 2)])


def test_models_that_are_not_related_are_refused(world, make_run):
    """With every problem, and nothing changed; moments are refused for related models, too."""
    run = make_run("run")
    found = run.save(1)
    other = make_run("other", engine=engine_of(world, Related()))
    before = [t.clone() for t in all_of(other)]
    with pytest.raises(
        ValueError, match=r"is of another model:\n  query_mask.* here \(2, 2\)\n.*\n  table: there \(7,\)"
    ):
        restore_weights(found, other.engine, other.ema, moments=False)
    assert equal(all_of(other), before)


class Masked(nn.Module):
    """The tiny model with a part that comes and goes with the settings."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.table = nn.Linear(3, 5), nn.Linear(5, 2), nn.Parameter(torch.randn(7))
        self.block = nn.ModuleDict({"query_mask": nn.ModuleList([nn.Linear(2, 2)])})


def test_a_related_model_keeps_its_own_start_where_nothing_is_given(world, make_run):
    run = make_run("run")
    run.train(0)
    found = run.save(1)
    other = make_run("other", engine=engine_of(world, Masked()))
    mask = other.engine.module.get_parameter("block.query_mask.0.weight").detach().clone()
    with pytest.raises(
        ValueError, match=r"is of a model with other settings, whose moments fit .* without carry_moments"
    ):
        restore_weights(found, other.engine, other.ema, moments=True)
    lines = restore_weights(found, other.engine, other.ema, moments=False)
    assert lines == [
        "5 of 7 parameters as they were",
        "block.query_mask.0.weight: new, from their own start",
        "block.query_mask.0.bias: new, from their own start",
    ]
    assert torch.equal(other.engine.module.get_parameter("block.query_mask.0.weight"), mask)
    for name in ("first.weight", "table"):
        assert torch.equal(other.engine.module.get_parameter(name), found.parameter("master", name))


def test_the_average_is_not_the_masters(world, make_run):
    """Each kind is restored from its own tensors."""
    run = make_run()
    run.train(0, 1, 2)
    found, other = run.save(3), make_run("other", engine=engine_of(world, tiny(5)))
    train_steps(other.engine, range(1))
    resume(found, other.engine, other.ema, {})
    for kind, partitions in {
        "master": other.engine.masters,
        **other.ema.partitions,
        **other.engine.moments(),
    }.items():
        for slot in other.engine.slots:
            mine = partitions[slot.group].detach()[slot.offset : slot.offset + slot.numel].reshape(slot.shape)
            assert torch.equal(mine, found.parameter(kind, slot.name)), (kind, slot.name)
    assert not torch.equal(found.parameter("ema", "table"), found.parameter("master", "table"))
