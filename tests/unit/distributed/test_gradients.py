"""Gradients of a step on one process: fp32 sums over micro-batches and over a parameter's uses, against one large batch.

Several processes are in tests/distributed/test_gradients.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engines import admit, engine_of, one_process
from torch import Tensor, nn

from pretrain.distributed.engine import Engine, GradientCheck
from pretrain.distributed.gradients import GradientReducer
from pretrain.distributed.partition import Slot
from pretrain.distributed.world import World
from pretrain.models import DiT, PackedText, preset

BF16 = {"bf16": {"enabled": True}}
# A sum of these in bf16, whose numbers near 256 are 2 apart, stays at 256; each by itself is exact in bf16.
TERMS = (256.0, *(0.5 + i / 16 for i in range(7)))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with one_process() as world:
        yield world


class Scale(nn.Module):
    """A vector; its gradient is the sum of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, x_B3: Tensor, bias: bool) -> Tensor:
        y_B3 = x_B3 * self.weight
        return y_B3 + self.bias if bias else y_B3


class Reuse(Scale):
    """The vector is used once for each term."""

    def forward(self, x_T3: Tensor, bias: bool) -> Tensor:
        return torch.stack([x_3 * self.weight for x_3 in x_T3]) + self.bias


def gradient(engine: Engine, *micro_batches: Tensor, bias: bool = True) -> list[Tensor]:
    """The mean gradient of one step, as the check of the step sees it."""
    seen: list[Tensor] = []

    def check(squared_norm: Tensor) -> GradientCheck:
        seen.extend(g.clone() for g in engine.gradients)
        return admit(squared_norm)

    for x in micro_batches:
        engine.backward(engine.forward(x.to(engine.dtype), bias).float().sum())
        engine.step(0.0, check)
    return seen


def predict(model: DiT, dtype: torch.dtype) -> Tensor:
    """A prediction that depends on all weights."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    text = PackedText.pack([torch.randn(4, model.config.text_width).to(dtype)])
    latent = torch.randn(1, model.config.latent_channels, 8, 8).to(dtype)
    return model(latent, model.condition(torch.tensor([500.0]), text)).sample_BCHW


def test_eight_micro_batches_are_one_large_batch_in_fp32(world: World) -> None:
    rows = [torch.full((1, 3), term) for term in TERMS]
    small = gradient(engine_of(world, Scale(), 8, **BF16), *rows)
    large = gradient(engine_of(world, Scale()), torch.cat(rows))
    lost = torch.zeros(3, dtype=torch.bfloat16)
    for row in rows:
        lost += row[0].bfloat16()
    assert lost[0] == 256 and large[0][0] == sum(TERMS) > 260, "bf16 loses what this test looks for"
    assert [g.dtype for g in small] == [torch.float32] * 2
    assert torch.equal(8 * small[0], large[0])
    assert torch.equal(8 * small[1], large[1])


def test_the_uses_of_one_parameter_are_added_up_in_fp32(world: World) -> None:
    x = torch.tensor(TERMS)[:, None].expand(8, 3)
    model = Reuse()
    (weight, _) = gradient(engine_of(world, model, reused=[model.weight], **BF16), x)
    (rounded, _) = gradient(engine_of(world, Reuse(), **BF16), x)
    assert (weight == sum(TERMS)).all()
    assert (rounded != sum(TERMS)).all(), "autograd's own sum is bf16"


def test_the_shared_expert_is_such_a_parameter(world: World) -> None:
    model = DiT(preset("focusdit_tiny"))
    reused = model.reused_parameters
    assert {n for n, p in model.named_parameters() if any(p is r for r in reused)} == {
        "shared_expert.key.weight", "shared_expert.key.bias", "shared_expert.value.weight"
    }  # fmt: skip
    assert DiT(preset("dit_tiny")).reused_parameters == []
    engine_of(world, model, reused=reused, **BF16)
    seen = {}
    handles = [p.register_post_accumulate_grad_hook(lambda p: seen.update({id(p): p.grad_dtype})) for p in reused]
    predict(model, torch.bfloat16).sum().backward()
    for handle in handles:
        handle.remove()
    assert list(seen.values()) == [torch.float32] * 3


def test_buckets_follow_the_backward_pass(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """When three quarters of a real backbone's gradients have come, more than half are being reduced."""
    model = DiT(preset("focusdit_tiny"))
    come, reduced = [0], [0]
    add = GradientReducer.add

    def noted(self: GradientReducer, parameter: Tensor, last: bool) -> None:
        add(self, parameter, last)
        come.append(come[-1] + parameter.numel())
        reduced.append(sum(len(b.range) for b in self._buckets[: len(self._reductions)]))

    monkeypatch.setattr(GradientReducer, "add", noted)
    engine = engine_of(world, model, zero_optimization={"stage": 2, "overlap_comm": True, "reduce_bucket_size": 20_000})
    engine.backward(predict(model, torch.float32).sum())
    at = next(i for i, elements in enumerate(come) if elements > 0.75 * come[-1])
    assert reduced[at] > 0.5 * come[-1]


def test_a_parameter_that_is_not_used_has_no_gradient(world: World) -> None:
    """Not even the one of the step before; and one that only a later micro-batch uses has that one's alone."""
    engine = engine_of(world, Scale(), 2)
    ones = torch.ones(1, 3)
    assert gradient(engine, ones, ones)[1].tolist() == [1, 1, 1]
    assert gradient(engine, ones, ones, bias=False)[1].tolist() == [0, 0, 0]
    engine.backward(engine.forward(ones, False).sum())
    engine.step(0.0, admit)
    assert gradient(engine, ones)[1].tolist() == [0.5, 0.5, 0.5]


def test_gradients_are_freed_and_the_buffers_stay(world: World) -> None:
    """A step allocates no buffer anew, and DeepSpeed makes none of its own."""
    engine = engine_of(world, Scale(), 2, **BF16)
    before = [g.data_ptr() for g in engine.gradients]
    for _ in range(2):
        gradient(engine, torch.ones(1, 3), torch.ones(1, 3))
        assert all(p.grad is None for p in engine.module.parameters())
        assert [g.data_ptr() for g in engine.gradients] == before
        zero = engine._engine.optimizer
        assert not any(bucket.buffer for bucket in zero.ipg_buckets.values()) and not any(
            zero.all_grad_tensors.values()
        )


def test_a_parameter_whose_hook_fires_twice_in_a_backward_pass_is_refused() -> None:
    """Its bucket might be reduced too early."""
    parameter = nn.Parameter(torch.ones(2))
    reducer = GradientReducer({id(parameter): Slot("p", (2,), 0, 0)}, [2], 100, True, World.alone())
    parameter.grad = torch.ones(2)
    reducer.add(parameter, last=True)
    parameter.grad = torch.ones(2)
    with pytest.raises(AssertionError):
        reducer.add(parameter, last=True)
