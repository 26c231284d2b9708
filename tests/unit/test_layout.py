"""Loaded weights lie in memory as made ones do: processors compute other last bits where they lie otherwise.

`MKL_ENABLE_INSTRUCTIONS=SSE4_2` imitates such a processor: there, without `lay_out`, products of one row differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from release_double import write_release
from torch import nn

from data_prep.encoders import TextEncoder, Vae, lay_out, read_text_model
from pretrain.checkpoint.release_folder import load_release
from pretrain.pipeline import FocusDiTPipeline, FocusDiTTransformer2DModel


def misaligned(model: nn.Module) -> list[str]:
    """Names of the tensors that do not lie at a multiple of 64 bytes."""
    named = [*model.named_parameters(), *model.named_buffers()]
    assert named
    return [name for name, tensor in named if tensor.data_ptr() % 64]


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: FocusDiTTransformer2DModel.from_pretrained(folder / "transformer"),
        lambda folder: FocusDiTTransformer2DModel.from_pretrained(folder, subfolder="transformer"),
        lambda folder: FocusDiTTransformer2DModel.from_pretrained(folder / "transformer", output_loading_info=True)[0],
        lambda folder: read_text_model(folder / "text_encoder", torch.float32),
        lambda folder: TextEncoder("tiny").model,
        lambda folder: Vae("tiny").model,
        lambda folder: Vae(str(folder / "vae")).model,
    ],
    ids=[
        "transformer",
        "subfolder",
        "with information",
        "exported text encoder",
        "text encoder",
        "VAE",
        "exported VAE",
    ],
)
def test_a_loaded_model_is_aligned(load: Callable[[Path], Any], tiny_pipeline_folder: Path) -> None:
    assert misaligned(load(tiny_pipeline_folder)) == []


@pytest.mark.parametrize(
    "options",
    [{}, {"low_cpu_mem_usage": False}, {"torch_dtype": torch.bfloat16}, {"torch_dtype": {"default": torch.float32}}],
    ids=["as it is", "low_cpu_mem_usage", "bf16", "a dtype for each"],
)
def test_a_loaded_pipeline_is_aligned(options: dict[str, Any], tiny_pipeline: Any, tiny_pipeline_folder: Path) -> None:
    loaded = FocusDiTPipeline.from_pretrained(tiny_pipeline_folder, **options)
    for component in ("transformer", "text_encoder", "vae"):
        model = getattr(loaded, component)
        assert misaligned(model) == [], component
        strides = {name: tensor.stride() for name, tensor in getattr(tiny_pipeline, component).state_dict().items()}
        assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == strides, component


def test_the_imported_release_is_aligned(tmp_path: Path) -> None:
    write_release(tmp_path / "release")
    assert misaligned(load_release(tmp_path / "release")) == []


def shift(model: nn.Module) -> None:
    """Moves every weight to an address that is 4 bytes beyond a multiple of 64."""
    for tensor in (*model.parameters(), *model.buffers()):
        moved = torch.empty(tensor.numel() + 1)[1:].view(tensor.shape)
        tensor.data = moved.copy_(tensor.data)


def test_weights_anywhere_are_laid_out() -> None:
    """The values, shared weights and gradients' owners stay; what lies well already is not copied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.BatchNorm1d(5))
    model[1].weight = model[0].weight
    shift(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    assert len(misaligned(model)) == len(parameters) + 3
    assert lay_out(model) is model
    assert misaligned(model) == []
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert model[1].weight is model[0].weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    places = [tensor.data_ptr() for tensor in model.parameters()]
    assert [tensor.data_ptr() for tensor in lay_out(model).parameters()] == places


def test_wherever_its_weights_lay_it_computes_the_same_bits(tiny_pipeline_folder: Path) -> None:
    """One machine, one number of threads, one layout: so equal bits."""
    folder = tiny_pipeline_folder / "transformer"
    one, other = (FocusDiTTransformer2DModel.from_pretrained(folder) for _ in range(2))
    shift(other)
    given = torch.randn(1, 4, 8, 8), torch.randn(1, 1, 128), 500.0
    with torch.no_grad():
        assert torch.equal(one(*given).sample, lay_out(other)(*given).sample)
