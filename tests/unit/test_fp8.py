"""fp8 products, emulated on the CPU: which maps take them, how far results go, and that nothing else changes."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from backbones import build
from engines import admit, engine_of, one_process
from support import ROOT
from torch import Tensor

from pretrain import fp8 as module
from pretrain.compilation import GRAPHS, compile_for_training
from pretrain.config import load
from pretrain.distributed.torch_private import compiled_graphs
from pretrain.fp8 import fp8_problems, large_maps, use_fp8
from pretrain.models import DiT, PackedText, preset
from pretrain.models.dit import StepConditioning
from pretrain.models.mixers.flexdit import FlexDiTSection
from pretrain.models.text import TEXT_MULTIPLE

pytestmark = pytest.mark.usefixtures("one_thread", "torchao")

SMALL = {"width": 64, "heads": 2, "depth": 4, "patch": 2, "text_width": 16, "mask_hidden": (16, 8)}
BACKBONES = {
    "focusdit": replace(preset("focusdit_tiny"), **SMALL),
    "mediators": replace(preset("dit_tiny"), attention="mediators", **SMALL),
    "flexdit": replace(
        preset("dit_tiny"), density="flexdit", flexdit=FlexDiTSection(split=(1, 1, 1, 1)), **SMALL | {"depth": 6}
    ),
}
TORCHAO = ROOT / ".venv" / "torchao"
ON = {"bf16": {"enabled": True}}


@pytest.fixture(scope="module")
def torchao() -> Iterator[None]:
    """The library from its own folder, for these tests alone."""
    if not (TORCHAO / "torchao").is_dir():
        pytest.fail(f"{TORCHAO} is missing: `make test` sets it up", pytrace=False)
    sys.path.append(str(TORCHAO))
    yield
    sys.path.remove(str(TORCHAO))


def inputs(model: DiT, lengths: tuple[int, ...] = (5, 9, 3)) -> tuple[Tensor, StepConditioning]:
    """Latents, and their conditioning with captions of these lengths, in the model's precision."""
    generator, config = torch.Generator().manual_seed(1), model.config
    dtype = next(model.parameters()).dtype
    captions = [torch.randn(n, config.text_width, generator=generator).to(dtype) for n in lengths]
    latent = torch.randn(len(lengths), config.latent_channels, 32, 32, generator=generator).to(dtype)
    return latent, model.condition(torch.full((len(lengths),), 500.0), PackedText.pack(captions, TEXT_MULTIPLE))


def loss_of(prediction: Tensor, latent: Tensor) -> Tensor:
    return (prediction.double() - latent.double()).square().mean()


def one_pass(model: DiT, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The prediction and all gradients, end to end, in fp64."""
    model = model.to(dtype)
    latent, conditioning = inputs(model)
    prediction = model(latent, conditioning).sample_BCHW.double()
    loss_of(prediction, latent).backward()
    return prediction.detach(), torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def ffn_gradients(model: DiT, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    latent, conditioning = inputs(model, lengths)
    ffn = large_maps(model)["blocks.1.ffn.key"]
    return torch.autograd.grad(loss_of(model(latent, conditioning).sample_BCHW, latent), list(ffn.parameters()))


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", BACKBONES)
def test_the_blocks_large_maps_and_no_others(name: str) -> None:
    model = build(BACKBONES[name])
    parameters = {n: id(p) for n, p in model.named_parameters()}
    large = set(large_maps(model))
    use_fp8(model, "tensorwise", emulate=True)
    in_fp8 = {n for n, m in model.named_modules() if type(m).__name__ == "Float8Linear"}
    assert in_fp8 == large
    ends = Counter(n.split(".", 2)[-1] if n.startswith("blocks") else n for n in in_fp8)
    depth = model.config.depth
    # FlexDiT's pooling blocks have no attention among tokens: a value for each.
    assert ends.pop("self_attention.qkv") + ends.pop("self_attention.value", 0) == depth
    shared = {"shared_expert.key": 1, "shared_expert.value": 1} if name == "focusdit" else {}
    every = ("self_attention.out", "cross_attention.q", "cross_attention.out", "ffn.key", "ffn.value")
    assert ends == dict.fromkeys(every, depth) | shared
    assert {n: id(p) for n, p in model.named_parameters()} == parameters


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("name", BACKBONES)
def test_results_are_off_by_8_bits(name: str, scaling) -> None:
    """Between 2 and 15 times as far from fp64 as with bf16, in the prediction and in all gradients."""
    model = build(BACKBONES[name])
    exact = one_pass(copy.deepcopy(model).double(), torch.float64)
    plain = one_pass(copy.deepcopy(model), torch.bfloat16)
    use_fp8(model, scaling, emulate=True)
    found = one_pass(model, torch.bfloat16)
    for a, b, c in zip(found, plain, exact, strict=True):
        assert 2 * error(b, c) < error(a, c) < 15 * error(b, c)
        assert error(a, c) < 0.1


def test_recomputed_blocks_give_the_same_gradients() -> None:
    model = build(BACKBONES["focusdit"])
    use_fp8(model, "rowwise", emulate=True)
    again = copy.deepcopy(model)
    again.recompute = True
    assert torch.equal(one_pass(model, torch.bfloat16)[1], one_pass(again, torch.bfloat16)[1])


def test_compiled_blocks_compute_the_same_with_no_more_graphs() -> None:
    model = build(BACKBONES["focusdit"]).bfloat16()
    use_fp8(model, "tensorwise", emulate=True)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        before = compiled_graphs()
        compile_for_training(compiled, "aot_eager")
        for lengths in ((5, 9, 3), (5, 70, 3), (130, 9, 3)):
            found, expected = (ffn_gradients(m, lengths) for m in (compiled, model))
            assert all(map(torch.equal, found, expected))
        assert 0 < compiled_graphs() - before <= GRAPHS["focusdit"]
    torch._dynamo.reset()


def test_under_zero_masters_and_gradients_stay_in_fp32() -> None:
    """Two micro-batches a step of an emulated fp8 model: the sums of gradients and the masters are fp32, and the loss falls."""
    with one_process() as world:
        model = build(BACKBONES["focusdit"])
        use_fp8(model, "tensorwise", emulate=True)
        engine = engine_of(world, model, micro_batches=2, reused=model.reused_parameters, bf16={"enabled": True})
        assert {m.dtype for m in engine.masters} == {torch.float32}
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        losses = []
        for _ in range(12):
            latent, conditioning = inputs(model)
            loss = loss_of(engine.forward(latent, conditioning).sample_BCHW, latent)
            engine.backward(loss)
            engine.step(1e-3, admit)
            losses.append(loss.item())
        assert {g.dtype for g in engine.gradients} == {torch.float32}
        assert losses[0] == losses[1] and losses[-1] < 0.9 * losses[0]


def test_sides_that_16_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.fp8: shared_expert.key is 40 × 80; both must be divisible by 16"):
        use_fp8(build(replace(BACKBONES["focusdit"], width=40)), "tensorwise")


def test_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert fp8_problems("tensorwise", ON, True, None) == []
    assert fp8_problems("tensorwise", {}, False, torch.device("cpu")) == [
        "model.fp8: goes with bf16.enabled of the DeepSpeed config alone",
        "model.fp8: needs model.compile=true; in eager mode rounding takes longer than fp8 products save",
        "model.fp8: cpu has no fp8 products; leave model.fp8 out",
    ]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert fp8_problems("tensorwise", ON, True, gpu) == []
    assert fp8_problems("rowwise", ON, True, gpu) == [
        "model.fp8: rowwise needs compute capability 9.0; NVIDIA L40S has 8.9; leave model.fp8 out"
    ]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert fp8_problems("tensorwise", ON, True, gpu)[0].startswith("model.fp8: torchao is not installed; pip install ")


def test_the_config_names_the_scalings() -> None:
    config, _ = load("stage1_256", ["model.fp8=rowwise"])
    assert config.model.fp8 == "rowwise"
    with pytest.raises(ValueError, match=r"model.fp8: .*'tensorwise' or 'rowwise'"):
        load("stage1_256", ["model.fp8=int8"])
