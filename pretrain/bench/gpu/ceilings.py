"""Ceilings: what the device's memory and its matrix units reach by themselves, in the backbone's own products, too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.bench.gpu.session import NotHere, Numbers, Session


def run(session: Session) -> None:
    """Measures copies, products and a launch."""
    session.measure("copy", _copy)
    side = 256 if session.settings.small else 8192
    session.measure(f"product {side}³, {session.dtype}".replace("torch.", ""), _product, side, side, side)
    D = session.shapes.focusdit.width
    resolution, images = next(iter(session.shapes.micro.items()))
    tokens = images * (resolution // 8 // session.shapes.focusdit.patch) ** 2
    for name, k, n in (("qkv", D, 3 * D), ("out", D, D), ("FFN key", D, 2 * D), ("FFN value", 2 * D, D)):
        session.measure(f"product {name}, {tokens} × {k} × {n}", _product, tokens, k, n)
    session.measure(f"product {side}³, fp8", _fp8_product, side)
    session.measure("launch", _launch)


def _copy(session: Session) -> Numbers:
    size = 2**24 if session.settings.small else 2**32
    source = torch.ones(size, dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    rate = 2 * size / session.seconds(lambda: target.copy_(source)) / 1e12
    return {"TB/s": rate} | ({"of the data sheet": rate / session.gpu.memory_tbs} if session.gpu else {})


def _product(session: Session, m: int, k: int, n: int) -> Numbers:
    a = torch.randn(m, k, device=session.device, dtype=session.dtype)
    b = torch.randn(n, k, device=session.device, dtype=session.dtype).T
    return _rate(session, lambda: a @ b, m * k * n, session.gpu.bf16_tflops if session.gpu else None)


def _fp8_product(session: Session, side: int) -> Numbers:
    if not session.cuda:
        raise NotHere("a CPU has no fp8 products")
    if torch.cuda.get_device_capability(session.device) < (8, 9):
        raise NotHere("the device has no fp8 products")
    if not hasattr(F, "scaled_mm"):
        raise NotHere(f"torch {torch.__version__} has no scaled_mm")
    a = torch.randn(side, side, device=session.device).to(torch.float8_e4m3fn)
    b = torch.randn(side, side, device=session.device).to(torch.float8_e4m3fn).T
    one = torch.ones((), device=session.device)
    kind = F.ScalingType.TensorWise

    def product() -> Tensor:
        return F.scaled_mm(a, b, one, kind, one, kind, output_dtype=torch.bfloat16, use_fast_accum=True)

    return _rate(session, product, side**3, session.gpu.fp8_tflops if session.gpu else None)


def _rate(session: Session, product: object, macs: int, peak: float | None) -> Numbers:
    repeats = 1 if session.settings.small else 10

    def several() -> None:
        for _ in range(repeats):
            product()  # type: ignore[operator]

    tflops = 2 * macs * repeats / session.seconds(several) / 1e12
    return {"TFLOP/s": tflops} | ({"of the data sheet": tflops / peak} if peak else {})


def _launch(session: Session) -> Numbers:
    """Time that one tiny operation takes from Python, in a row of them."""
    x = torch.zeros(1, device=session.device)

    def many() -> None:
        for _ in range(1000):
            x.add_(1)

    return {"µs": session.seconds(many, rounds=3, warm_up=1) * 1e3}
