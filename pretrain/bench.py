"""Benchmarks: ratios of things timed side by side in one run.

    python -m pretrain.bench step

`step`: a training step (forward and backward) of the plain DiT against diffusers' PixArtTransformer2DModel of the same width,
depth and tokens. Captions have 20 to 150 tokens; ours sees them unpadded, PixArt's padded to the cap with a mask, and, to
tell padding from the rest, both with captions of one length.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from pretrain.models import DiT, DiTConfig, PackedText, preset
from pretrain.train import quiet


def pixart(c: DiTConfig) -> PixArtTransformer2DModel:
    """diffusers' model of the same size."""
    return PixArtTransformer2DModel(
        num_attention_heads=c.heads,
        attention_head_dim=c.width // c.heads,
        in_channels=c.latent_channels,
        out_channels=c.latent_channels,
        num_layers=c.depth,
        cross_attention_dim=c.width,
        caption_channels=c.text_width,
        patch_size=c.patch,
        sample_size=32,
        use_additional_conditions=False,
    )


def side_by_side(
    one: Callable[[], None], other: Callable[[], None], rounds: int, device: torch.device
) -> tuple[float, float]:
    """Median seconds of both, taken in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 2):
        for run, kept in zip((one, other), times, strict=True):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if i >= 2:
                kept.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def step(args: argparse.Namespace) -> str:
    """The table of `bench step`."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
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
        run_ours = _ours(ours, latent, timestep, captions)
        run_theirs = _theirs(theirs, latent, timestep, captions, cap)
        a, b = side_by_side(run_ours, run_theirs, args.rounds, device)
        lines.append(
            f"  {name:<40} ours {a * 1e3:8.1f} ms   PixArtTransformer2DModel {b * 1e3:8.1f} ms   ratio {a / b:.2f}"
        )
    return "\n".join(lines)


def _ours(model: DiT, latent: Tensor, timestep: Tensor, captions: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(latent, timestep, PackedText.pack(captions)).sample_BCHW.square().mean().backward()

    return run


def _theirs(
    model: PixArtTransformer2DModel, latent: Tensor, timestep: Tensor, captions: list[Tensor], cap: int
) -> Callable[[], None]:
    padded = torch.stack([torch.nn.functional.pad(c, (0, 0, 0, cap - len(c))) for c in captions])
    keep = torch.stack([(torch.arange(cap, device=latent.device) < len(c)).to(latent.dtype) for c in captions])
    conditions = {"resolution": None, "aspect_ratio": None}

    def run() -> None:
        model.zero_grad(set_to_none=True)
        output = model(latent, padded, timestep, conditions, encoder_attention_mask=keep).sample
        output.square().mean().backward()

    return run


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Times things side by side.")
    commands = parser.add_subparsers(dest="command", required=True)
    for_step = commands.add_parser("step", help="a training step against diffusers' PixArt transformer")
    for_step.add_argument("--preset", default="dit_1b")
    for_step.add_argument("--depth", type=int, default=4, help="blocks to build (0: the preset's own); default 4")
    for_step.add_argument("--tokens-per-side", type=int, default=16, help="16 is 256 px with patch 2")
    for_step.add_argument("--batch", type=int, default=4)
    for_step.add_argument("--rounds", type=int, default=5)
    for_step.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    quiet()
    print({"step": step}[args.command](args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
