"""fp8 products in training: the blocks' large linear maps as torchao's `Float8Linear`, whose weights stay what they are.

A product's two operands are rounded to 8 bits, each divided by its largest value: of the whole tensor (`tensorwise`), or of each
row (`rowwise`, more exact, slower). Forward and backward passes compute so; weights, gradients, what is between the products, the
optimizer and checkpoints stay as they are (docs/choices.md has the errors).

What stays in bf16: the embeddings of patches, times and captions, the modulations, the query masks, the last layer, and the
captions' keys and values, whose number of tokens differs from batch to batch.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import nn

from pretrain.models import DiT

Scaling = Literal["tensorwise", "rowwise"]

LARGE = re.compile(
    r"blocks\.\d+\.(self_attention\.(qkv|value|out)|cross_attention\.(q|out)|ffn\.(key|value))|shared_expert\.(key|value)"
)
MULTIPLE = 16  # of both sides of a matrix
# The least compute capability: Ada and Hopper have fp8 products, Hopper those with a scale for each row.
CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}


def computes_in_fp8(name: str) -> bool:
    """True for the name of a module of the backbone that is one of its large maps."""
    return LARGE.fullmatch(name) is not None


def large_maps(model: DiT) -> dict[str, nn.Linear]:
    """The linear maps that compute in fp8, by name."""
    return {name: cast(nn.Linear, m) for name, m in model.named_modules() if computes_in_fp8(name)}


def use_fp8(model: DiT, scaling: Scaling, emulate: bool = False) -> None:
    """Replaces the large maps in place; the parameters are the same objects.

    Args:
        emulate: round the operands, and multiply them in the weights' precision, on any device.

    Raises:
        ValueError: a map's sides are not divisible by 16.
        ModuleNotFoundError: torchao is missing.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # late: it takes seconds, and is optional

    for name, m in large_maps(model).items():
        if m.in_features % MULTIPLE or m.out_features % MULTIPLE:
            raise ValueError(
                f"model.fp8: {name} is {m.in_features} × {m.out_features}; both must be divisible by {MULTIPLE}: "
                "choose another width, or leave model.fp8 out"
            )
    # Products of the weights' gradients add up over a micro-batch's tokens: their number is padded to a multiple of 16, too.
    config = replace(Float8LinearConfig.from_recipe_name(scaling), pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: computes_in_fp8(name))


def fp8_problems(scaling: Scaling, deepspeed: dict[str, Any], compiled: bool, device: torch.device | None) -> list[str]:
    """Why a training cannot compute in fp8, a line each; none where it can. Without a device, what is wrong on any."""
    problems = []
    if find_spec("torchao") is None:
        problems.append(
            "model.fp8: torchao is not installed; pip install 'focusdit-pretrain[fp8]', or leave model.fp8 out"
        )
    if not deepspeed.get("bf16", {}).get("enabled"):
        problems.append("model.fp8: goes with bf16.enabled of the DeepSpeed config alone")
    if not compiled:
        problems.append(
            "model.fp8: needs model.compile=true; in eager mode rounding takes longer than fp8 products save"
        )
    if device is None:
        return problems
    if device.type != "cuda":
        problems.append(f"model.fp8: {device.type} has no fp8 products; leave model.fp8 out")
    elif (there := torch.cuda.get_device_capability(device)) < CAPABILITY[scaling]:
        name, (major, minor) = torch.cuda.get_device_name(device), CAPABILITY[scaling]
        problems.append(
            f"model.fp8: {scaling} needs compute capability {major}.{minor}; {name} has {there[0]}.{there[1]}; "
            "leave model.fp8 out"
        )
    return problems
