"""The average over a real engine's partitions, against a dense average of all parameters in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engines import engine_of, one_process, train_steps

from pretrain.config import OptimizerSection
from pretrain.distributed.ema import Ema
from pretrain.distributed.world import World

BF16 = {"bf16": {"enabled": True}}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with one_process() as world:
        yield world


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
def test_against_a_dense_average(precision, world: World) -> None:
    """avg_0 = w_0, avg_{k+1} = d_k · avg_k + (1 − d_k) · w_{k+1} with d_k = min(decay, (1 + k) / (10 + k))."""
    engine = engine_of(world, **precision)
    ema = Ema(engine, OptimizerSection(ema_decay=0.4))
    dense = [m.detach().double() for m in engine.masters]
    for step in range(8):
        train_steps(engine, range(step, step + 1), lr=0.05)
        ema.update(step)
        decay = min(0.4, (1 + step) / (10 + step))
        dense = [decay * d + (1 - decay) * m.detach().double() for d, m in zip(dense, engine.masters, strict=True)]
    assert (1 + 7) / (10 + 7) > 0.4 > 1 / 10, "both branches of the decay were used"
    for partition, expected in zip(ema.partitions["ema"], dense, strict=True):
        assert partition.dtype == torch.float32
        torch.testing.assert_close(partition.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_large_decay_moves_it_in_bf16_training(world: World) -> None:
    """0.9999 would be lost in bf16; the average is of fp32 masters."""
    engine = engine_of(world, **BF16)
    ema = Ema(engine, OptimizerSection(ema_decay=0.9999))
    before = [p.clone() for p in ema.partitions["ema"]]
    with torch.no_grad():
        for master in engine.masters:
            master += 0.1
    ema.update(10**9)
    for partition, old in zip(ema.partitions["ema"], before, strict=True):
        torch.testing.assert_close(partition - old, torch.full_like(old, 1e-5), rtol=0.05, atol=1e-7)


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
def test_applied_and_back(precision, world: World) -> None:
    """Within it the module has the average, afterwards its own weights bit for bit; also where an error is raised."""
    engine = engine_of(world, **precision)
    ema = Ema(engine, OptimizerSection(ema_decay=0.9))
    train_steps(engine, range(3), lr=0.1)
    weights = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    masters = [m.detach().clone() for m in engine.masters]
    with ema.applied():
        for slot in engine.slots:
            average = ema.partitions["ema"][slot.group][slot.offset : slot.offset + slot.numel].reshape(slot.shape)
            weight = engine.module.get_parameter(slot.name)
            assert torch.equal(weight, average.to(engine.dtype))
            assert not torch.equal(weight, weights[slot.name])
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert all(torch.equal(p, weights[n]) for n, p in engine.module.named_parameters())
    assert all(torch.equal(m, before) for m, before in zip(engine.masters, masters, strict=True))


def test_several_averages_each_by_its_own_decay(world: World) -> None:
    """Each moves as it would alone; `applied` puts in the one that is named."""
    engine = engine_of(world)
    together = Ema(engine, OptimizerSection(ema_decay=0.9, more_ema_decays=(0.2, 0.05)))
    alone = {d: Ema(engine, OptimizerSection(ema_decay=d)) for d in (0.9, 0.2, 0.05)}
    for step in range(4):
        train_steps(engine, range(step, step + 1), lr=0.1)
        for ema in (together, *alone.values()):
            ema.update(step)
    assert list(together.partitions) == ["ema", "ema_0.2", "ema_0.05"]
    for partitions, single in zip(together.partitions.values(), alone.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(partitions, single.partitions["ema"], strict=True))
    slot = engine.slots[0]
    for name, partitions in together.partitions.items():
        with together.applied(name):
            average = partitions[slot.group][slot.offset : slot.offset + slot.numel].reshape(slot.shape)
            assert torch.equal(engine.module.get_parameter(slot.name), average)
