"""A stage's work: its buckets against those of a real engine, its times against arithmetic."""

from __future__ import annotations

import pytest
from engines import one_process

from pretrain.config import load
from pretrain.distributed.engine import Engine
from pretrain.distributed.gradients import cut_into_buckets
from pretrain.distributed.optimizer import build_optimizer
from pretrain.models import DiT, preset
from pretrain.plan.__main__ import parse
from pretrain.plan.setting import setting_of
from pretrain.plan.stage import Stage
from pretrain.plan.work import buckets_of, network_of, work_of


def stage(*words: str, name: str = "stage1_256") -> Stage:
    args = parse([name, "--samples", "1e6", *words])
    return Stage.load(name, args.overrides, setting_of(args, None))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_buckets_are_those_of_an_engine(optimizer: str) -> None:
    config, deepspeed = load("demo_256", [f"optimizer.name={optimizer}"])
    shape = config.model.backbone()
    with one_process() as world:
        model = DiT(shape)
        words = deepspeed | {"gradient_accumulation_steps": 2}
        engine = Engine(model, build_optimizer(model, config.optimizer), words, world, model.reused_parameters)
        named = {slot.name: slot for slot in engine.slots}
        slots = {number: named[name] for number, (name, _) in enumerate(model.named_parameters())}
        real = cut_into_buckets(slots, [len(m) for m in engine.masters], 100_000, 1)
    planned = buckets_of(shape, optimizer == "muon", 100_000, 1)
    assert [b.size for b in planned] == [4 * len(b.range) for b in real]
    assert len(real) > 20


def test_a_bucket_is_ready_when_the_backward_pass_has_left_its_first_block() -> None:
    """In order; the shared expert, which every block uses, and the embeddings come last."""
    c = preset("focusdit_1b_shared2d")
    ready = [b.ready for b in buckets_of(c, False, 10_000_000, 8)]
    assert ready == sorted(ready) and ready[-1] == 1.0
    assert [round(r * 28) for r in ready] == pytest.approx([r * 28 for r in ready])
    assert ready[0] <= 2 / 28  # the last blocks' weights are the first to be complete
    parameters = sum(b.size for b in buckets_of(c, False, 10_000_000, 8) if b.ready == 1.0) / 4
    assert parameters > 2 * 2 * c.width**2  # of the shared expert, at the least


def test_the_buckets_hold_all_gradients() -> None:
    c = preset("focusdit_1b_shared2d")
    for gpus in (1, 24, 1024):
        assert sum(b.size for b in buckets_of(c, False, 50_000_000, gpus)) == pytest.approx(4 * 1027902120, rel=1e-4)


def test_times() -> None:
    one = stage("--mfu", "0.5", "--nodes", "2")
    work = work_of(one, 0.02, overlap=True)
    assert work.micro_batches * one.micro.images * 16 == one.batch
    assert work.compute_s == pytest.approx(one.step_s)
    assert (work.gather_size, work.exchange_size) == (2 * one.parameters, 4 * one.parameters / 16)
    network = network_of(one.cluster)
    assert (network.per_node, network.link_gbs, network.network_gbs) == (8, 0.8 * 450, 0.8 * 50)
    again = stage("model.recompute=true", "--mfu", "0.5", "--nodes", "2")
    assert work_of(again, 0.0, overlap=True).compute_s == pytest.approx(4 / 3 * again.step_s)


def test_deepspeeds_own_bucket_where_none_is_named() -> None:
    """It is larger than the demo's model, so each of its two groups is one bucket."""
    small = stage("--nodes", "1", "optimizer.name=adamw", name="demo_256")
    sizes = [b.size for b in work_of(small, 0.0, overlap=True).buckets]
    assert len(sizes) == 2 and sum(sizes) == pytest.approx(4 * small.parameters, rel=1e-3)
