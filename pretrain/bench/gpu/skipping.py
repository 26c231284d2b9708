"""Skipping: time of a sampling step where FFNs are left out by their query masks, against the FLOPs that are saved."""

from __future__ import annotations

import torch

from pretrain.bench.gpu.session import Numbers, Session
from pretrain.models import CachedConditioning, DiT, Skip
from pretrain.models.cost import saved_flops
from pretrain.models.focusdit.skip import UNITS

IMAGES = 8  # both halves of guidance for four pictures
SHARES = (0.0, 0.25, 0.5, 0.75)


@torch.no_grad()
def run(session: Session) -> None:
    """Measures a step without and with each threshold."""
    config, resolution = session.shapes.focusdit, max(session.shapes.micro)
    model = session.model(config).eval()
    for index in range(config.depth):
        mask = model.block(index).query_mask
        assert mask is not None
        torch.nn.init.normal_(mask.last.linear.weight, std=1.0)  # masks all over 0..1
    text = session.text(config, [session.shapes.caption[1]] * IMAGES)
    (time,) = model.embed_times(torch.full((1,), 500.0, device=session.device))
    conditioning, latent = CachedConditioning(time, model.encode_text(text)), session.latent(config, IMAGES, resolution)
    masks_KBN = model(latent, conditioning).masks_KBN
    assert masks_KBN is not None
    plain = session.seconds(lambda: model(latent, conditioning))
    session.put("without", "done", "", {"ms": 1e3 * plain})
    for unit in UNITS:
        judged = masks_KBN.float() if unit == "token" else masks_KBN.float().mean(-1)
        for share in SHARES:
            threshold = judged.flatten()[:: max(judged.numel() // 100000, 1)].quantile(share).item()
            skip = Skip(min(max(threshold, 0.0), 1.0), unit)
            session.measure(
                f"{unit}, threshold {threshold:.3f}",
                _step,
                model,
                latent,
                conditioning,
                skip,
                plain,
            )


def _step(
    session: Session, model: DiT, latent: torch.Tensor, conditioning: CachedConditioning, skip: Skip, plain: float
) -> Numbers:
    masks = model(latent, conditioning, skip).masks
    kept_1K = torch.stack([skip.keep(m_BN).sum() for m_BN, _ in masks])[None].cpu()
    tokens_1K = torch.tensor([[m_BN.numel() for m_BN, _ in masks]])
    saved = (
        saved_flops(model.config, kept_1K, tokens_1K).sum() / saved_flops(model.config, 0 * kept_1K, tokens_1K).sum()
    )
    seconds = session.seconds(lambda: model(latent, conditioning, skip))
    return {"ms": 1e3 * seconds, "of the time without": seconds / plain, "FFN FLOPs saved": saved.item()}
