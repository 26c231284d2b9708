"""Methods: training passes and sampling steps of FlexDiT and mediators beside the dense DiT and FocusDiT, by budget."""

from __future__ import annotations

import torch

from pretrain.bench.gpu.session import Numbers, Session
from pretrain.bench.gpu.training import training_pass
from pretrain.models import CachedConditioning, ComputeBudget, DiTConfig
from pretrain.models.budget_choices import every_budget
from pretrain.models.cost import count_flops, grid_of


def run(session: Session) -> None:
    """Measures each backbone at each of its budgets."""
    shapes, resolution = session.shapes, max(session.shapes.micro)
    images = max(shapes.micro[resolution] // 2, 1)
    dense: dict[str, float] = {}
    for name in ("dit", "focusdit", "flexdit", "mediators"):
        config: DiTConfig = getattr(shapes, name)
        for budget in every_budget(config):
            choice = ", ".join(str(number) for _, number in budget.choices)
            title = f"{resolution} px, {name}" + (f", budget {choice}" if choice else "")
            session.measure(title, _time, config, budget, resolution, images, dense, needs=3)


def _time(
    session: Session, config: DiTConfig, budget: ComputeBudget, resolution: int, images: int, dense: dict[str, float]
) -> Numbers:
    """Times, and their relation to the first model's, which is kept in `dense`."""
    model = session.model(config)
    training = session.seconds(training_pass(session, model, resolution, images, budget=budget), rounds=3, warm_up=2)
    with torch.no_grad():
        text = session.text(config, [session.shapes.caption[1], 1])
        (time,) = model.embed_times(torch.full((1,), 500.0, device=session.device))
        conditioning, latent = CachedConditioning(time, model.encode_text(text)), session.latent(config, 2, resolution)
        step = session.seconds(lambda: model(latent, conditioning, budget=budget), rounds=5, warm_up=2)
    flops = count_flops(config, grid_of(config, resolution, 8), session.shapes.caption[1], budget).total
    found = {"training": training, "step": step, "FLOPs": float(flops)}
    for key, value in found.items():
        dense.setdefault(key, value)
    share = {f"{key} of DiT's": value / dense[key] for key, value in found.items()}
    return {"training ms": 1e3 * training, "sampling step ms": 1e3 * step, "micro-batch": images} | share
