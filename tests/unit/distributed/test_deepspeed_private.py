"""Each part of DeepSpeed's inner state that is relied on is there, is what it was, and is reached in one file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import pytest
import torch
from engines import adamw, admit, engine_of, inputs, loss_of, one_process, tiny
from private_interfaces import documented, listed, reached
from torch import Tensor

from pretrain.distributed.deepspeed_private import PRIVATE
from pretrain.distributed.engine import Engine
from pretrain.distributed.world import World

FILE = "pretrain/distributed/deepspeed_private.py"
VERSION = deepspeed.__version__


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with one_process() as world:
        yield world


@pytest.fixture(scope="module")
def engine(world: World) -> Engine:
    """A bf16 engine with the gradients of one micro-batch of two, so that nothing is reduced or cleared yet."""
    engine = engine_of(world, micro_batches=2, bf16={"enabled": True})
    engine.backward(loss_of(engine.forward(inputs(0).bfloat16())))
    return engine


def tensors(value: Any) -> bool:
    return len(value) == 2 and all(isinstance(v, Tensor) for v in value)


# What each attribute must be, on a real engine with two optimizer groups.
KINDS = {
    "DeepSpeedEngine.optimizer": lambda v: type(v).__name__ == "DeepSpeedZeroOptimizer",
    "DeepSpeedEngine.is_gradient_accumulation_boundary": lambda v: v() is False,
    "DeepSpeedEngine.was_step_applied": callable,
    "DeepSpeedEngine.zero_overlap_comm": lambda v: v() is False,
    "DeepSpeedEngine.zero_reduce_bucket_size": lambda v: v() == 500_000_000,
    "DeepSpeedZeroOptimizer.averaged_gradients": lambda v: isinstance(v, dict),
    "DeepSpeedZeroOptimizer.bit16_groups": lambda v: [len(group) for group in v] == [2, 3],
    "DeepSpeedZeroOptimizer.bit16_groups_flat": lambda v: tensors(v) and v[0].dtype == torch.bfloat16,
    "DeepSpeedZeroOptimizer.check_grad_overflow": lambda v: v is True,
    "DeepSpeedZeroOptimizer.check_overflow": callable,
    "DeepSpeedZeroOptimizer.dp_process_group": lambda v: v is None or isinstance(v, torch.distributed.ProcessGroup),
    "DeepSpeedZeroOptimizer.optimizer": lambda v: isinstance(v, torch.optim.AdamW),
    "DeepSpeedZeroOptimizer.overflow": lambda v: v is False,
    "DeepSpeedZeroOptimizer.overlapping_partition_gradients_reduce_epilogue": callable,
    "DeepSpeedZeroOptimizer.parallel_partitioned_bit16_groups": lambda v: all(tensors([p[0]] * 2) for p in v),
    "DeepSpeedZeroOptimizer.param_groups": lambda v: [g["weight_decay"] for g in v] == [0.1, 0.0],
    "DeepSpeedZeroOptimizer.process_gradients": callable,
    "DeepSpeedZeroOptimizer.scaled_global_norm": callable,
    "DeepSpeedZeroOptimizer.single_partition_of_fp32_groups": lambda v: tensors(v) and v[0].dtype == torch.float32,
    "deepspeed.ops.__compatible_ops__": lambda v: "deepspeed_shm_comm" in v,
    "deepspeed.utils.groups._WORLD_GROUP": lambda v: v is None or isinstance(v, torch.distributed.ProcessGroup),
}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_attribute_is_there(name: str, engine: Engine) -> None:
    owner, _, attribute = name.rpartition(".")
    holder = {
        "DeepSpeedEngine": engine._engine,
        "DeepSpeedZeroOptimizer": engine._engine.optimizer,
        "deepspeed.ops": deepspeed.ops,
        "deepspeed.utils.groups": deepspeed.utils.groups,
    }[owner]
    assert hasattr(holder, attribute), f"DeepSpeed {VERSION} has no {name}: see docs/dependencies.md"
    value = getattr(holder, attribute)
    assert KINDS[name](value), f"in DeepSpeed {VERSION} {name} is {value!r}: see docs/dependencies.md"


REPLACED = (
    "check_overflow",
    "overlapping_partition_gradients_reduce_epilogue",
    "process_gradients",
    "scaled_global_norm",
)


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced_is_a_method(name: str) -> None:
    """Of DeepSpeed's own class: an assignment to a name that it does not call would go unnoticed."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert callable(getattr(DeepSpeedZeroOptimizer, name, None)), f"DeepSpeed {VERSION} has no {name}"


def test_the_tables() -> None:
    """The docs, the table in the file, what the file reaches, and what is tested here are the same names."""
    names = listed(PRIVATE)
    assert documented(FILE) == names == set(KINDS)
    assert reached(FILE, "self._zero", "engine", "self._engine") | {"__compatible_ops__", "_WORLD_GROUP"} == {
        name.rpartition(".")[2] for name in names
    }
    assert reached(FILE, "deepspeed.ops", "groups") == {"__compatible_ops__", "_WORLD_GROUP"}


def test_step_asks_the_check_once_and_clips_by_its_norm(world: World) -> None:
    """Once for each update, not for each micro-batch; a norm twice the limit halves the gradients."""
    calls: list[float] = []
    engine = engine_of(world, micro_batches=2, gradient_clipping=0.5)
    model = tiny()
    reference = adamw(model)
    for micro in range(4):
        engine.backward(loss_of(engine.forward(inputs(micro))))
        engine.step(0.01, lambda squared: (calls.append(squared.item()), admit(torch.ones_like(squared)))[1])
    assert len(calls) == 2
    for step in range(2):
        reference.zero_grad()
        sum(loss_of(model(inputs(2 * step + i))) / 2 for i in range(2)).backward()  # type: ignore[union-attr]
        squares = sum(p.grad.double().square().sum().item() for p in model.parameters())  # type: ignore[union-attr]
        assert calls[step] == pytest.approx(squares, rel=1e-5)
        for p in model.parameters():
            assert p.grad is not None
            p.grad *= 0.5 / (1 + 1e-6)
        reference.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(engine.module.get_parameter(name), p, rtol=1e-5, atol=1e-6)


def test_the_check_counts_in_fp32_too(world: World) -> None:
    """Without `check_grad_overflow` DeepSpeed applies a NaN gradient where bf16 is off."""
    engine = engine_of(world)
    before = [m.detach().clone() for m in engine.masters]
    engine.backward(loss_of(engine.forward(inputs(0))) * float("nan"))
    engine.step(0.01, lambda squared: admit(squared) if squared.isfinite() else type(admit(squared))(squared, False))
    assert not engine.applied
    assert all(torch.equal(m, b) for m, b in zip(engine.masters, before, strict=True))
