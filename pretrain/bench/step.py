"""A training step (forward and backward) of the plain DiT against diffusers' PixArtTransformer2DModel of the same width, depth
and tokens.

Captions have 20 to 150 tokens; ours sees them unpadded, PixArt's padded to the cap with a mask, and, to tell padding from the
rest, both with captions of one length.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from data_prep.encoders import working_dtype
from pretrain.bench.timing import model_arguments, padded, pixart, side_by_side
from pretrain.models import DiT, PackedText, preset


def arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser, preset="dit_1b", batch=4, rounds=5)


def run(args: argparse.Namespace) -> str:
    """The table."""
    device = torch.device(args.device)
    dtype = working_dtype(device)
    config = replace(preset(args.preset), depth=args.depth) if args.depth else preset(args.preset)
    ours, theirs = DiT(config).to(device, dtype), pixart(config).to(device, dtype)
    side = args.tokens_per_side * config.patch
    latent = torch.randn(args.batch, config.latent_channels, side, side, device=device, dtype=dtype)
    timestep = torch.rand(args.batch, device=device) * 1000
    rng = random.Random(0)
    mixed = [rng.randint(20, 150) for _ in range(args.batch)]
    lines = [
        f"{args.preset}: width {config.width}, depth {config.depth}, {args.tokens_per_side**2} tokens, batch {args.batch}"
    ]
    for name, lengths, cap in (
        ("captions of 20 to 150 tokens, cap 300", mixed, 300),
        ("all captions 80 tokens", [80] * args.batch, 80),
    ):
        captions = [torch.randn(n, config.text_width, device=device, dtype=dtype) for n in lengths]
        runs = {
            "ours": _ours(ours, latent, timestep, captions),
            "pixart": _theirs(theirs, latent, timestep, captions, cap),
        }
        took = side_by_side(runs, args.rounds, device)
        lines.append(
            f"  {name:<40} ours {took['ours'] * 1e3:8.1f} ms   PixArtTransformer2DModel {took['pixart'] * 1e3:8.1f} ms   "
            f"ratio {took['ours'] / took['pixart']:.2f}"
        )
    return "\n".join(lines)


def _ours(model: DiT, latent: Tensor, timestep: Tensor, captions: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        conditioning = model.condition(timestep, PackedText.pack(captions))
        model(latent, conditioning).sample_BCHW.square().mean().backward()

    return run


def _theirs(
    model: PixArtTransformer2DModel, latent: Tensor, timestep: Tensor, captions: list[Tensor], cap: int
) -> Callable[[], None]:
    text, keep = padded(captions, cap)
    conditions = {"resolution": None, "aspect_ratio": None}

    def run() -> None:
        model.zero_grad(set_to_none=True)
        output = model(latent, text, timestep, conditions, encoder_attention_mask=keep).sample
        output.square().mean().backward()

    return run
