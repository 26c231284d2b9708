"""Training: forward and backward passes of the backbone, eager and compiled, at both resolutions: time, MFU and memory.

A micro-batch without the optimizer: the part `zero` has whole steps. MFU counts three forward passes against the data sheet's
bf16 rate. Memory stands beside the planner's sum (weights, gradients, activations by `count_activations`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pretrain.bench.gpu.session import NotHere, Numbers, Session
from pretrain.compilation import compile_for_training
from pretrain.fp8 import fp8_problems, use_fp8
from pretrain.models import ComputeBudget, DiT, DiTConfig
from pretrain.models.budget_choices import default_budget
from pretrain.models.cost import count_activations, count_parameters, grid_of, training_flops
from pretrain.models.text import TEXT_MULTIPLE


def run(session: Session) -> None:
    """Measures each way at each resolution, then half the micro-batch."""
    for way in ("eager", "compiled", "fp8"):
        for resolution, images in session.shapes.micro.items():
            _largest(session, resolution, images, way)
    for resolution, images in session.shapes.micro.items():
        smaller = max(images // 2, 1)
        name = f"{resolution} px, compiled, micro-batch {smaller}"
        session.measure(name, measure, resolution, smaller, "compiled", needs=10)


def _largest(session: Session, resolution: int, images: int, way: str) -> None:
    """With so many images, or half or a quarter of them where they do not fit."""
    for micro in (images, images // 2, images // 4):
        status = session.measure(
            f"{resolution} px, {way}, micro-batch {micro}", measure, resolution, micro, way, needs=10
        )
        if status != "out of memory":
            return


def measure(session: Session, resolution: int, images: int, way: str, config: DiTConfig | None = None) -> Numbers:
    """Time, rate and memory of a micro-batch."""
    config = config or session.shapes.focusdit
    model = prepare(session, config, way)
    step = training_pass(session, model, resolution, images)
    weights = session.allocated_gib()
    step()
    # Compiling and the first choice of kernels have passed.
    seconds = session.seconds(step, warm_up=1)
    numbers = {"ms": 1e3 * seconds, "images/s": images / seconds}
    lengths = session.lengths(images)
    grid = grid_of(config, resolution, 8)
    if session.gpu:
        flops = training_flops(config, images, grid, sum(lengths), default_budget(config, 0.5))
        numbers["MFU %"] = 100 * flops / seconds / (session.gpu.bf16_tflops * 1e12)
    if (peak := session.peak_gib()) is not None:
        assert weights is not None
        parameters = count_parameters(config).total
        mean = sum(lengths) / images
        planned = (4 * parameters + images * count_activations(config, grid, mean)) / 2**30
        numbers |= {"peak GiB": peak, "planned GiB": planned, "weights GiB": weights}
    return numbers


def prepare(session: Session, config: DiTConfig, way: str) -> DiT:
    """The backbone, computing in one of the ways. Raises NotHere where it cannot."""
    model = session.model(config)
    if way == "eager":
        return model
    if not session.cuda:
        raise NotHere("on a CPU Inductor compiles C++ for minutes")
    if way == "fp8":
        if problems := fp8_problems("tensorwise", {"bf16": {"enabled": True}}, True, session.device):
            raise NotHere("; ".join(problems))
        use_fp8(model, "tensorwise")
    torch.compiler.reset()
    compile_for_training(model)
    return model


def training_pass(
    session: Session,
    model: DiT,
    resolution: int,
    images: int,
    lengths: list[int] | None = None,
    budget: ComputeBudget | None = None,
) -> Callable[[], Tensor]:
    """A forward and backward pass over a made micro-batch; gives the loss, and leaves the gradients."""
    config = model.config
    text = session.text(config, lengths or session.lengths(images), TEXT_MULTIPLE)
    latent = session.latent(config, images, resolution)
    timestep = torch.rand(images, device=session.device) * 1000
    budget = budget or default_budget(config, 0.5)
    keep = None
    if config.mask != "none":
        tokens = (resolution // 8 // config.patch) ** 2
        keep = (torch.rand(config.depth, images, tokens, device=session.device) > config.mask_dropout).float()

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        prediction = model(latent, model.condition(timestep, text), None, keep, budget)
        loss = (prediction.sample_BCHW.float() - latent).square().mean()
        loss.backward()
        return loss.detach()

    return step


def gradients(model: DiT) -> Mapping[str, Tensor]:
    """The gradients of the last pass by parameter."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
