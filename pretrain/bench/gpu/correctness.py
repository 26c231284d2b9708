"""Correctness on the device: forward and backward passes, attention, random numbers and sampling, each against a reference.

The reference of a pass is the same backbone with the same weights in fp64 on the same device. Errors are relative: the norm of
the difference by the reference's norm. bf16's own is about 1e-2 here, as it keeps 8 bits of each of some hundred operations.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain.bench.gpu.session import NotHere, Numbers, Session, Wrong, fits_in
from pretrain.bench.gpu.training import gradients, prepare, training_pass
from pretrain.diffusion import draw
from pretrain.models import DiT, PackedText

DEPTH, IMAGES = 2, 4
MOST = {torch.float8_e4m3fn: 0.2, torch.bfloat16: 5e-2, torch.float32: 1e-4}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def run(session: Session) -> None:
    """Compares passes, random numbers, sampling and attention with their references."""
    torch.backends.cuda.matmul.allow_tf32 = False
    session.measure("pass, eager, against fp64", _pass, "eager")
    session.measure("unequal captions, each against itself alone", _captions)
    session.measure("random numbers, device against CPU", _random)
    session.measure("sampling, device against fp64", _sampling)
    for name, backend in BACKENDS.items():
        for kind in ("self", "cross, with a mask"):
            session.measure(f"attention, {kind}, {name}", _attention, backend, kind)
    session.measure("pass, compiled, against fp64", _pass, "compiled", needs=5)
    session.measure("pass, fp8, against fp64", _pass, "fp8", needs=5)


def error(found: Tensor, reference: Tensor) -> float:
    """The relative error of a tensor."""
    reference = reference.double()
    return ((found.double() - reference).norm() / reference.norm()).item()


def _pass(session: Session, way: str) -> Numbers:
    """Loss and all gradients of one pass."""
    config = replace(session.shapes.focusdit, depth=DEPTH)
    resolution = next(iter(session.shapes.micro))
    model = prepare(session, config, way)
    exact = session.model(config).double()
    torch.manual_seed(1)
    loss = training_pass(session, model, resolution, IMAGES)()
    torch.manual_seed(1)
    expected = _in_double(session, exact, resolution)
    found, reference = gradients(model), gradients(exact)
    if found.keys() != reference.keys():
        raise Wrong("other parameters have a gradient", {"parameters": len(found)})
    flat, flat_reference = (torch.cat([g[name].flatten().double() for name in found]) for g in (found, reference))
    worst = max(found, key=lambda name: (found[name].double() - reference[name]).norm().item())
    numbers = {"loss": loss.item(), "loss in fp64": expected.item(), "worst parameter": worst}
    most = MOST[torch.float8_e4m3fn if way == "fp8" else session.dtype]
    return fits_in(error(flat, flat_reference), most, numbers)


def _in_double(session: Session, exact: DiT, resolution: int) -> Tensor:
    """The loss of the same pass in fp64: the same random numbers, rounded likewise."""
    double = copy.copy(session)
    double.text = lambda *given: replace(  # type: ignore[method-assign]
        (text := session.text(*given)), tokens_ME=text.tokens_ME.double()
    )
    double.latent = lambda *given: session.latent(*given).double()  # type: ignore[method-assign]
    return training_pass(double, exact, resolution, IMAGES)()


@torch.no_grad()
def _captions(session: Session) -> Numbers:
    """A batch of unequal captions gives each picture what it gets alone: no caption sees padding, nor another caption."""
    config = replace(session.shapes.focusdit, depth=DEPTH)
    model, resolution = session.model(config), next(iter(session.shapes.micro))
    lengths = session.lengths(IMAGES)
    text, latent = session.text(config, lengths), session.latent(config, IMAGES, resolution)
    timestep = torch.full((IMAGES,), 500.0, device=session.device)
    together = model(latent, model.condition(timestep, text)).sample_BCHW
    alone = [
        model(latent[i : i + 1], model.condition(timestep[:1], PackedText.pack([caption]))).sample_BCHW
        for i, caption in enumerate(text.captions())
    ]
    return fits_in(error(together, torch.cat(alone)), MOST[session.dtype], {"captions": len(lengths)})


def _random(session: Session) -> Numbers:
    """A sample's random numbers are the same on every device."""
    if not session.cuda:
        raise NotHere("the device is the CPU")
    shape, seeds = torch.Size((IMAGES, 12, 32, 32)), list(range(IMAGES))
    here, there = (draw(seeds, shape, device) for device in (session.device, torch.device("cpu")))
    pairs = [(a.cpu(), b) for a, b in zip(vars(here).values(), vars(there).values(), strict=True) if a is not None]
    apart = max((a - b).abs().max().item() for a, b in pairs if a.numel())
    return fits_in(apart, 1e-5, {"seeds": len(seeds)})


@torch.no_grad()
def _sampling(session: Session) -> Numbers:
    """Latents after Euler's steps along the flow, both halves of guidance."""
    from pretrain.diffusion import Guidance, generate
    from pretrain.schedulers import build_scheduler, set_timesteps

    config = replace(session.shapes.focusdit, depth=DEPTH)
    model, resolution = session.model(config), next(iter(session.shapes.micro))
    text, noise = session.text(config, session.lengths(2)), session.latent(config, 2, resolution).float()
    null = session.text(config, [1])
    latents = []
    for dtype in (session.dtype, torch.float64):
        scheduler = build_scheduler("flow", 3.0)
        set_timesteps(scheduler, 4, session.device)
        backbone = copy.deepcopy(model).to(dtype)
        encoded, empty = (backbone.encode_text(t.to(session.device, dtype)) for t in (text, null))
        times = backbone.embed_times(scheduler.timesteps)
        drawn = generate(backbone, encoded, empty, times, noise, scheduler, Guidance(4.0), dtype)
        latents.append(drawn.latent_BCHW)
    return fits_in(error(*latents), MOST[session.dtype], {"steps": 4})


def _attention(session: Session, backend: SDPBackend, kind: str) -> Numbers:
    """torch's attention by one backend, forward and backward, at the backbone's shapes."""
    if not session.cuda:
        raise NotHere("a CPU has one attention kernel")
    config, resolution = session.shapes.focusdit, max(session.shapes.micro)
    N, h, d = (resolution // 8 // config.patch) ** 2, config.heads, config.width // config.heads
    M = N if kind == "self" else 192
    torch.manual_seed(0)
    q, k, v = (torch.randn(8, h, n, d, device=session.device, dtype=session.dtype) for n in (N, M, M))
    mask = None
    if kind != "self":
        mask = (torch.arange(M, device=session.device) < torch.randint(20, M, (8, 1), device=session.device))[
            :, None, None
        ]
    results = []
    for chosen, dtype in ((backend, session.dtype), (SDPBackend.MATH, torch.float64)):
        a, b, c = inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        try:
            with sdpa_kernel(chosen):
                F.scaled_dot_product_attention(a, b, c, attn_mask=mask).square().mean().backward()
        except RuntimeError as problem:
            if chosen == backend and "No available kernel" in str(problem):
                raise NotHere("torch has no such kernel for these shapes on this device") from problem
            raise
        results.append(torch.cat([x.grad.flatten() for x in inputs if x.grad is not None]))

    def forward() -> None:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    flops = 4 * 8 * h * N * M * d
    rate = {"forward TFLOP/s": flops / session.seconds(forward) / 1e12}
    return fits_in(error(*results), MOST[session.dtype], rate)
