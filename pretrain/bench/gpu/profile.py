"""Profile: the kernels in which a compiled training pass and a sampling step spend their time, and the attention kernels used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity

from pretrain.bench.gpu.session import Numbers, Session
from pretrain.bench.gpu.training import prepare, training_pass
from pretrain.models import CachedConditioning

TOP = 20
ATTENTION = ("flash", "cudnn", "fmha", "attention", "sdpa")


def run(session: Session) -> None:
    """Profiles a training pass and a sampling step."""
    for resolution, images in session.shapes.micro.items():
        name = f"{resolution} px, training, micro-batch {images}"
        session.measure(name, _training, resolution, images, needs=5)
    session.measure(f"{resolution} px, sampling, one picture", _sampling, resolution, needs=5)


def _training(session: Session, resolution: int, images: int) -> Numbers:
    model = prepare(session, session.shapes.focusdit, "compiled" if session.cuda else "eager")
    step = training_pass(session, model, resolution, images)
    return _profile(session, step)


def _sampling(session: Session, resolution: int) -> Numbers:
    config = session.shapes.focusdit
    model = session.model(config).eval()
    with torch.no_grad():
        text = session.text(config, [session.shapes.caption[1], 1])
        (time,) = model.embed_times(torch.full((1,), 500.0, device=session.device))
        conditioning = CachedConditioning(time, model.encode_text(text))
        latent = session.latent(config, 2, resolution)
        return _profile(session, lambda: model(latent, conditioning))


def _profile(session: Session, step: Callable[[], object]) -> Numbers:
    for _ in range(3):
        step()
    session.wait()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if session.cuda else [])
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        session.wait()
    kind = torch.autograd.DeviceType.CUDA if session.cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    spent = {e.key: (e.self_device_time_total if session.cuda else e.self_cpu_time_total) / 1e3 for e in events}
    calls = {event.key: event.count for event in events}
    order = sorted(spent, key=lambda key: -spent[key])
    attention = [key[:80] for key in order if any(word in key.lower() for word in ATTENTION)]
    return {
        "ms in kernels": sum(spent.values()),
        "kernels": sum(calls.values()),
        "attention by": "; ".join(attention[:3]) or "none found",
        "top": [{"kernel": key[:160], "ms": spent[key], "calls": calls[key]} for key in order[:TOP]],
    }
