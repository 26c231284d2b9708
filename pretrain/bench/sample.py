"""Sampling: FocusDiT against the plain DiT, and both against the transformer of diffusers' PixArtAlphaPipeline of the same size.

Timed is what a sampling step asks of the backbone, both halves of guidance in one batch, and, apart, what is done once per
prompt (ours: the captions' keys and values, and all that follows from the times alone). PixArt's is given captions padded to
300 tokens, as its pipeline does, and, to tell padding from the rest, unpadded ones of the same length in both halves.

With `--models`, the backbone's methods beside each other instead (methods.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_prep.encoders import working_dtype
from pretrain.bench import methods
from pretrain.bench.timing import CLOCKS, model_arguments, padded, pixart, side_by_side
from pretrain.models import CachedConditioning, DiT, DiTConfig, PackedText, preset

CAP = 300


@dataclass(frozen=True)
class Timed:
    """One line of the table: a step, and what a prompt costs once."""

    name: str
    step: Callable[[], object]
    prompt: Callable[[], object] | None


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    model_arguments(parser, preset="dit_1b", batch=1, rounds=5, depth=None)
    parser.add_argument("--steps", type=int, default=20, help="sampling steps that a prompt's own cost is spread over")
    parser.add_argument("--caption-tokens", type=int, default=80, help="tokens of each caption; the null text has one")
    parser.add_argument(
        "--models", nargs="+", choices=methods.MODELS, help="compare these with the DiT instead (8 blocks)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=methods.PARTS, default=methods.PARTS, help="of --models; default all"
    )
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="of --models; cpu: for a busy machine, on one thread"
    )


@torch.no_grad()
def run(args: argparse.Namespace) -> str:
    """The table."""
    if args.models:
        return methods.run(args)
    depth = 4 if args.depth is None else args.depth
    device = torch.device(args.device)
    dtype = working_dtype(device)
    base = replace(preset(args.preset), depth=depth) if depth else preset(args.preset)
    side = args.tokens_per_side * base.patch
    latent = torch.randn(2 * args.batch, base.latent_channels, side, side, device=device, dtype=dtype)
    timestep = torch.full((2 * args.batch,), 500.0, device=device)
    text = [torch.randn(args.caption_tokens, base.text_width, device=device, dtype=dtype) for _ in range(args.batch)]
    null = [torch.randn(1, base.text_width, device=device, dtype=dtype)] * args.batch
    equal = [torch.randn_like(text[0])] * args.batch

    def build(**changes: str) -> DiT:
        return DiT(replace(base, **changes)).to(device, dtype).eval()  # type: ignore[arg-type]

    dit = build()
    rows = [
        _ours("DiT", dit, latent, args.steps, text + null),
        _ours("FocusDiT, release mask", build(mask="release"), latent, args.steps, text + null),
        _ours("FocusDiT, and shared FFN of 2D", build(mask="release", ffn="shared"), latent, args.steps, text + null),
        _ours("DiT, both halves of equal length", dit, latent, args.steps, text + equal),
        *_pixart(
            base, latent, timestep, {f"padded to {CAP}": (text + null, CAP), "unpadded, equal": (text + equal, None)}
        ),
    ]
    runs = {row.name: row.step for row in rows} | {f"{row.name}: prompt": row.prompt for row in rows if row.prompt}
    took = side_by_side(runs, args.rounds, device)
    per_step = {row.name: took[row.name] + took.get(f"{row.name}: prompt", 0.0) / args.steps for row in rows}
    title = f"{args.preset}: width {base.width}, depth {base.depth}, {args.tokens_per_side**2} tokens, {args.batch} pictures with"
    lines = [
        f"{title} guidance, captions of {args.caption_tokens} tokens, {args.steps} steps, {device.type}",
        f"  {'':<44}{'step':>10}{'prompt':>10}{'a step, with its share':>24}",
    ]
    for row in rows:
        once = took.get(f"{row.name}: prompt", 0.0)
        lines.append(
            f"  {row.name:<44}{took[row.name] * 1e3:>7.1f} ms{once * 1e3:>7.1f} ms{per_step[row.name] * 1e3:>21.1f} ms"
        )
    plain, focus, shared, plain_equal, pix, pix_equal = (per_step[row.name] for row in rows)
    lines += [
        f"  FocusDiT / DiT                       {focus / plain:.2f}   (with the shared FFN {shared / plain:.2f})",
        f"  DiT / PixArt padded to {CAP}           {plain / pix:.2f}   (FocusDiT {focus / pix:.2f})",
        f"  DiT / PixArt unpadded, equal         {plain_equal / pix_equal:.2f}",
    ]
    return "\n".join(lines)


def _ours(name: str, model: DiT, latent: Tensor, steps: int, captions: list[Tensor]) -> Timed:
    packed = PackedText.pack(captions)
    timesteps = torch.linspace(1000, 0, steps, device=latent.device)
    caches = model.embed_times(timesteps)[0], model.encode_text(packed)
    return Timed(
        name,
        lambda: model(latent, CachedConditioning(*caches)),
        lambda: (model.encode_text(packed), model.embed_times(timesteps)),
    )


def _pixart(
    config: DiTConfig, latent: Tensor, timestep: Tensor, cases: dict[str, tuple[list[Tensor], int | None]]
) -> list[Timed]:
    model = pixart(config).to(latent.device, latent.dtype).eval()
    conditions = {"resolution": None, "aspect_ratio": None}

    def timed(name: str, captions: list[Tensor], cap: int | None) -> Timed:
        text, keep = padded(captions, cap) if cap else (torch.stack(captions), None)
        return Timed(
            f"PixArtTransformer2DModel, {name}",
            lambda: model(latent, text, timestep, conditions, encoder_attention_mask=keep),
            None,
        )

    return [timed(name, captions, cap) for name, (captions, cap) in cases.items()]
