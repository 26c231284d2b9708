"""The engine against torch.optim.AdamW in fp32, and what it keeps of each parameter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engines import adamw, admit, engine_of, inputs, loss_of, one_process, refuse, tiny, train_steps
from torch import Tensor

from pretrain.distributed.engine import Engine, squared_norm
from pretrain.distributed.world import World

BF16 = {"bf16": {"enabled": True}}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with one_process() as world:
        yield world


def of(engine: Engine, partitions: list[Tensor], name: str) -> Tensor:
    """A parameter's values in the partitions of the one process."""
    (slot,) = [s for s in engine.slots if s.name == name]
    return partitions[slot.group].detach()[slot.offset : slot.offset + slot.numel].reshape(slot.shape)


def snapshot(engine: Engine) -> list[Tensor]:
    """All that a step may change."""
    state = [*engine.masters, *(m for kind in engine.moments().values() for m in kind), *engine.module.parameters()]
    return [t.detach().clone() for t in state]


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


# ---- a start ----


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
def test_masters_are_the_exact_initial_weights(precision, world: World) -> None:
    """DeepSpeed alone would make them of weights that are rounded to bf16."""
    engine, model = engine_of(world, **precision), tiny()
    assert sorted(s.name for s in engine.slots) == sorted(n for n, _ in model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(of(engine, engine.masters, name), p)
        assert torch.equal(engine.module.get_parameter(name), p.to(engine.dtype))
    assert engine.dtype == (torch.bfloat16 if precision else torch.float32)


def test_slots_lie_end_to_end_and_padding_is_zero(world: World) -> None:
    engine = engine_of(world)
    for group, master in enumerate(engine.masters):
        at = 0
        for slot in [s for s in engine.slots if s.group == group]:
            assert slot.offset == at
            at += slot.numel
        assert master[at:].count_nonzero() == 0
    assert engine.layout[0] == {"name": "first.weight", "shape": (5, 3), "group": 0, "offset": 0}


def test_the_hash_of_the_layout(world: World) -> None:
    """Names, shapes and groups in order; not the values."""
    engine = engine_of(world)
    assert engine.layout_hash == engine_of(world, tiny(seed=1)).layout_hash
    before = engine.layout_hash
    engine.slots = [*engine.slots[1:], engine.slots[0]]
    assert engine.layout_hash != before


# ---- steps ----


def test_steps_as_torch_optim_does(world: World) -> None:
    """Three updates of two micro-batches each, every one with its own learning rate."""
    engine, model = engine_of(world, micro_batches=2), tiny()
    reference = adamw(model)
    for step, lr in enumerate((0.01, 0.05, 0.001)):
        for group in reference.param_groups:
            group["lr"] = lr
        reference.zero_grad()
        for micro in range(2):
            x = inputs(2 * step + micro)
            (loss_of(model(x)) / 2).backward()
            engine.backward(loss_of(engine.forward(x)))
            engine.step(lr, admit)
            assert engine.applied == (micro == 1)
        reference.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(of(engine, engine.masters, name), p.detach(), rtol=1e-6, atol=1e-7)
    assert engine.updates == 3
    for kind, moments in engine.moments().items():
        for name, p in model.named_parameters():
            torch.testing.assert_close(of(engine, moments, name), reference.state[p][kind], rtol=1e-5, atol=1e-8)


def test_bf16_weights_are_rounded_fp32_masters(world: World) -> None:
    """AdamW in fp32 over the gradients of the bf16 model; weights are the masters' rounding after each step."""
    engine, model, masters = engine_of(world, **BF16), tiny().bfloat16(), tiny()
    reference = adamw(masters)
    for step in range(4):
        x = inputs(step).bfloat16()
        model.zero_grad()
        loss_of(model(x)).backward()
        for p, master in zip(model.parameters(), masters.parameters(), strict=True):
            assert p.grad is not None
            master.grad = p.grad.float()
        reference.step()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters.parameters(), strict=True):
                p.copy_(master)
        engine.backward(loss_of(engine.forward(x)))
        engine.step(0.01, admit)
        for name, master in masters.named_parameters():
            mine = of(engine, engine.masters, name)
            torch.testing.assert_close(mine, master.detach(), rtol=1e-6, atol=1e-7)
            assert torch.equal(engine.module.get_parameter(name), mine.bfloat16())
    assert any(not torch.equal(m, m.bfloat16().float()) for m in engine.masters), "no update is lost to rounding"


def test_the_check_is_given_the_squared_norm(world: World) -> None:
    engine, model, told = engine_of(world), tiny(), []
    loss_of(model(inputs(0))).backward()
    engine.backward(loss_of(engine.forward(inputs(0))))
    engine.step(0.01, lambda squared: (told.append(squared), admit(squared))[1])
    (squared,) = told
    assert squared.dtype == torch.float64 and squared.shape == ()
    expected = sum(p.grad.double().square().sum().item() for p in model.parameters())  # type: ignore[union-attr]
    assert squared.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
def test_a_step_that_is_not_admitted_changes_nothing(precision, world: World) -> None:
    """And the next one is as if it had not been."""
    engine, other = (engine_of(world, **precision) for _ in range(2))
    train_steps(engine, range(2))
    train_steps(other, range(2))
    before = snapshot(engine)
    engine.backward(loss_of(engine.forward(inputs(9).to(engine.dtype))) * 1e6)
    engine.step(0.01, refuse)
    assert not engine.applied
    assert same(snapshot(engine), before) and engine.updates == 2
    train_steps(engine, range(2, 4))
    train_steps(other, range(2, 4))
    assert engine.applied and same(snapshot(engine), snapshot(other))


def test_squared_norm() -> None:
    """Of bf16 tensors too, and of none; sums of squares beyond fp32 are held."""
    cpu = torch.device("cpu")
    assert squared_norm([], cpu).item() == 0
    assert squared_norm([torch.tensor([3.0]), torch.tensor([4.0, 12.0])], cpu).item() == pytest.approx(169)
    assert squared_norm([torch.full((4,), 2.0, dtype=torch.bfloat16)], cpu).item() == 16
    assert squared_norm([torch.tensor([1e30])], cpu).item() == pytest.approx(1e60)


def test_no_timer_of_deepspeeds_waits_for_the_device(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its throughput timer would, from the third step on."""
    from deepspeed.accelerator import get_accelerator

    calls: list[None] = []
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_: calls.append(None))
    engine = engine_of(world)
    train_steps(engine, range(4))
    assert calls == []
    engine._engine.tput_timer.config.enabled = True
    train_steps(engine, range(4, 8))
    assert calls


# ---- partitions ----


def test_moments_before_the_first_step(world: World) -> None:
    """They are zeros, and asking for them does not change the training."""
    engine, other = engine_of(world), engine_of(world)
    assert all(m.count_nonzero() == 0 for kind in engine.moments().values() for m in kind) and engine.updates == 0
    train_steps(engine, range(2))
    train_steps(other, range(2))
    assert same(snapshot(engine), snapshot(other)) and engine.updates == other.updates == 2


def test_the_count_of_updates_can_be_set(world: World) -> None:
    """With the moments and the masters it is all that AdamW needs: the copy goes on like the original."""
    engine, copy = engine_of(world), engine_of(world, tiny(seed=1))
    train_steps(engine, range(3))
    with torch.no_grad():
        for kind, moments in copy.moments().items():
            for moment, original in zip(moments, engine.moments()[kind], strict=True):
                moment.copy_(original)
        for master, original in zip(copy.masters, engine.masters, strict=True):
            master.copy_(original)
    copy.all_gather_weights(copy.masters)
    copy.updates = engine.updates
    assert copy.updates == 3
    train_steps(engine, range(3, 5))
    train_steps(copy, range(3, 5))
    assert same(snapshot(engine), snapshot(copy))


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_partitions_of_several_processes_are_one_process_s(processes: int, world: World) -> None:
    """Each process's part, put end to end, is the flat buffer; whichever process loads it."""
    engine = engine_of(world)
    values = {s.name: torch.randn(s.shape) for s in engine.slots}
    whole = [m.detach().clone() for m in engine.masters]
    engine.load_partitions(whole, values.__getitem__)
    for name, value in values.items():
        assert torch.equal(of(engine, whole, name), value)
    sizes = [-(-len(flat) // processes) for flat in whole]
    parts = []
    for rank in range(processes):
        engine.world = World(rank, processes, torch.device("cpu"))
        parts.append([torch.zeros(size) for size in sizes])
        engine.load_partitions(parts[-1], values.__getitem__)
    for group, flat in enumerate(whole):
        assert torch.equal(torch.cat([p[group] for p in parts])[: len(flat)], flat)


def test_a_parameter_that_is_not_read_stays(world: World) -> None:
    engine = engine_of(world)
    before = [m.detach().clone() for m in engine.masters]
    engine.load_partitions(engine.masters, lambda name: torch.zeros(7) if name == "table" else None)
    assert of(engine, engine.masters, "table").count_nonzero() == 0
    for slot in engine.slots:
        if slot.name != "table":
            assert torch.equal(of(engine, engine.masters, slot.name), of(engine, before, slot.name))


def test_gathering_other_partitions_leaves_the_masters(world: World) -> None:
    engine = engine_of(world, **BF16)
    masters = [m.detach().clone() for m in engine.masters]
    others = [torch.randn_like(m) for m in engine.masters]
    engine.all_gather_weights(others)
    for name, weight in engine.module.named_parameters():
        assert torch.equal(weight, of(engine, others, name).bfloat16())
    assert same([m.detach() for m in engine.masters], masters)
