"""Encoders: captions through a T5 of XXL's shape, and pictures through a VAE of Mochi's, with random weights."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel

from data_prep.encoders import Vae, encode_tokens, wait_for
from pretrain.bench.gpu.session import Numbers, Session

# Flan-T5-XXL's encoder, and a small one.
XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
SMALL = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "d_kv": 32, "feed_forward_proj": "gated-gelu"}
CAPTIONS = 256


def run(session: Session) -> None:
    """Measures captions and pictures."""
    session.measure("captions", _captions, needs=5)
    for resolution in session.shapes.micro:
        session.measure(f"{resolution} px, pictures", _pictures, resolution, needs=5)


def _captions(session: Session) -> Numbers:
    """Captions as a worker of data prep encodes them: sorted by length, with padding."""
    small = session.settings.small
    default = torch.get_default_dtype()
    torch.set_default_dtype(session.dtype)
    try:
        with session.device:
            model = T5EncoderModel(T5Config(**(SMALL if small else XXL))).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    rng = random.Random(0)
    ids = [[rng.randrange(3, 32000) for _ in range(n)] for n in session.lengths(16 if small else CAPTIONS)]

    def encode() -> None:
        encode_tokens(model, ids, 0, session.device)
        wait_for(session.device)

    seconds = session.seconds(encode, rounds=3, warm_up=1)
    tokens = sum(map(len, ids))
    return {"captions/s": len(ids) / seconds, "tokens/s": tokens / seconds} | _memory(session)


def _pictures(session: Session, resolution: int) -> Numbers:
    """Pictures as a worker of data prep encodes them: so many together as its budget of pixels allows."""
    from data_prep.worker.encoder import pixels_at_once

    images = 2 if session.settings.small else pixels_at_once(session.device) // resolution**2
    vae = Vae(str(_vae(session)), session.device)
    pictures = torch.rand(images, 3, resolution, resolution) * 2 - 1

    def encode() -> None:
        vae.encode(pictures)
        wait_for(session.device)

    seconds = session.seconds(encode, rounds=3, warm_up=1)
    return {"pictures/s": images / seconds, "at once": images} | _memory(session)


def _vae(session: Session) -> Path:
    """A folder with a VAE of random weights: Mochi's shape, or a small AutoencoderKL."""
    from pretrain.bench.picture import vae_of

    folder = session.folder / "vae"
    if not folder.exists():
        torch.manual_seed(0)
        with session.device:
            vae = vae_of(session.shapes.focusdit.latent_channels, session.settings.small)
        vae.to(session.dtype).save_pretrained(folder)  # type: ignore[operator]
    return folder


def _memory(session: Session) -> dict[str, float]:
    return {} if (peak := session.peak_gib()) is None else {"peak GiB": peak}
