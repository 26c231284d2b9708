"""Skipping FFNs by their query masks (FocusDiT, Fig. 9): time, FLOPs saved and deviation over the threshold.

The backbone has random weights, any size, and masks that are spread over 0..1: it serves to measure time; `python -m
pretrain.analyze skip` is for trained runs. The FFNs' own time is what is saved when every token is left out (a threshold of 1).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.encoders import working_dtype
from pretrain.bench.timing import model_arguments, side_by_side
from pretrain.diffusion import Generated, Guidance, generate, start_noise
from pretrain.models import CachedConditioning, DiT, PackedText, Skip, TextCache, preset
from pretrain.models.cost import saved_flops
from pretrain.models.focusdit.ffn import Vocabulary
from pretrain.models.focusdit.mask import MaskLinear, QueryMask
from pretrain.models.focusdit.skip import UNITS
from pretrain.sampling.plots import SkipPoint, plot_skip
from pretrain.schedulers import build_scheduler, set_timesteps


@dataclass(frozen=True)
class Subject:
    """A backbone, its captions, and the settings of its sampling."""

    name: str
    model: DiT
    text: TextCache
    null: TextCache
    noise: Tensor
    scheduler: Any
    guidance: float
    steps: int


def arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser, preset="focusdit_1b_shared2d", batch=1, rounds=5)
    parser.add_argument("--steps", type=int, default=1, help="sampling steps")
    parser.add_argument("--thresholds", type=float, nargs="+", help="default: by quantiles of the masks, from 0 to 1")
    parser.add_argument("--out", type=Path, help="folder for skip.png and skip.json (FLOPs saved by step and block)")


def run(args: argparse.Namespace) -> str:
    """The table; writes plot and counts where asked."""
    subject = random_subject(args, torch.device(args.device))
    curves = measure(subject, args.rounds, lambda masks, unit: args.thresholds or _quantiles(masks, unit))
    lines = [table(subject, curves)]
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        plot_skip(curves).save(args.out / "skip.png")
        counts = {u: [{**vars(p), "saved_SK": p.saved_SK.tolist()} for p in points] for u, points in curves.items()}
        (args.out / "skip.json").write_text(json.dumps(counts) + "\n")
        lines.append(f"see {args.out / 'skip.png'} and skip.json")
    return "\n".join(lines)


def table(subject: Subject, curves: Mapping[str, Sequence[SkipPoint]]) -> str:
    """A line for each threshold of each unit."""
    lines = [f"{subject.name}; {subject.steps} steps, guidance {subject.guidance}, {subject.noise.device.type}"]
    for unit, points in curves.items():
        none, every = points[0], points[-1]
        lines.append(
            f"  {unit:<7}{'threshold':>10}{'seconds':>10}{'FFN FLOPs saved':>17}{'FFN time saved':>16}{'deviation':>11}"
        )
        for p in points:
            time_saved = (none.seconds - p.seconds) / max(none.seconds - every.seconds, 1e-9)
            saved = f"{100 * p.saved:>16.1f}%{100 * time_saved:>15.1f}%"
            lines.append(f"  {'':<7}{p.threshold:>10.3f}{p.seconds:>10.3f}{saved}{p.deviation:>11.4f}")
    return "\n".join(lines)


@torch.no_grad()
def random_subject(args: argparse.Namespace, device: torch.device) -> Subject:
    """A model with random weights, whose query masks are spread over 0..1, with captions and noise to draw from."""
    dtype = working_dtype(device)
    config = replace(preset(args.preset), depth=args.depth) if args.depth else preset(args.preset)
    torch.manual_seed(0)
    model = DiT(config).to(device, dtype).eval()
    side = args.tokens_per_side * config.patch
    captions = [torch.randn(80, config.text_width, device=device, dtype=dtype) for _ in range(args.batch)]
    text, null = model.encode_text(PackedText.pack(captions)), model.encode_text(PackedText.pack([captions[0][:1]]))
    noise = start_noise(range(args.batch), (config.latent_channels, side, side)).to(device)
    spread_masks(model, noise.to(dtype), text)
    name = (
        f"{args.preset}, random weights: width {config.width}, depth {config.depth}, {args.tokens_per_side**2} tokens, "
        f"{args.batch} pictures"
    )
    return Subject(name, model, text, null, noise, build_scheduler("flow", 3.0), 5.5, args.steps)


def spread_masks(model: DiT, latent: Tensor, text: TextCache) -> None:
    """Gives a fresh backbone FFNs that change the tokens, and query masks all over 0..1, lower in the first blocks.

    Each mask's logits are brought to a standard deviation of 1.5, around −1.5 in the first block up to 1.5 in the last.
    """
    centres = iter(torch.linspace(-1.5, 1.5, model.config.depth).tolist())
    hooks = []

    def adjust(last: MaskLinear, inputs: tuple[Tensor, Tensor], logits: Tensor) -> Tensor:
        factor = 1.5 / logits.float().std().item()
        shift = next(centres) - factor * logits.float().mean().item()
        last.linear.weight.mul_(factor)
        last.linear.bias.mul_(factor).add_(shift)
        return logits * factor + shift

    for module in model.modules():
        if isinstance(module, Vocabulary):
            torch.nn.init.xavier_uniform_(module.value.weight)
        if isinstance(module, QueryMask):
            hooks.append(module.last.register_forward_hook(adjust))
    (time,) = model.embed_times(torch.tensor([500.0], device=latent.device))
    model(latent, CachedConditioning(time, text))
    for hook in hooks:
        hook.remove()


def _quantiles(masks_BSKN: Tensor, unit: str) -> list[float]:
    """Thresholds that leave out a tenth, a quarter, half, … of the work."""
    judged = masks_BSKN if unit == "token" else masks_BSKN.mean(-1)
    return [0.0, *judged.flatten().quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])).tolist(), 1.0]


@torch.no_grad()
def measure(
    subject: Subject, rounds: int, thresholds: Callable[[Tensor, str], Sequence[float]]
) -> dict[str, list[SkipPoint]]:
    """The points of each unit, at the thresholds that are given for the masks [B, S, K, N] of the pictures without skipping.

    Raises:
        ValueError: the model has no query masks.
    """
    plain = _sample(subject, None, keep_masks=True)
    if plain.masks_BSKN is None:
        raise ValueError("this model has no query masks, so there is nothing to skip by")
    return {unit: _curve(subject, rounds, unit, thresholds(plain.masks_BSKN, unit), plain) for unit in UNITS}


def _sample(subject: Subject, skip: Skip | None, keep_masks: bool = False) -> Generated:
    s, dtype = subject, subject.model.final.proj.weight.dtype
    set_timesteps(s.scheduler, s.steps, s.noise.device)
    times = s.model.embed_times(s.scheduler.timesteps)
    return generate(s.model, s.text, s.null, times, s.noise, s.scheduler, Guidance(s.guidance), dtype, skip, keep_masks)


def _curve(subject: Subject, rounds: int, unit: str, thresholds: Sequence[float], plain: Generated) -> list[SkipPoint]:
    """Every threshold, timed in turn."""
    skips = {t: Skip(t, unit) for t in thresholds}
    runs = {str(t): lambda skip=skip: _sample(subject, skip) for t, skip in skips.items()}
    took = side_by_side(runs, rounds, subject.noise.device)
    config = subject.model.config
    points = []
    for t, skip in skips.items():
        drawn = _sample(subject, skip)
        assert drawn.work is not None
        saved_SK = saved_flops(config, drawn.work.kept_SK, drawn.work.tokens_SK)
        whole = saved_flops(config, torch.zeros(1), drawn.work.tokens_SK).sum().item()
        difference = (drawn.latent_BCHW - plain.latent_BCHW).norm() / plain.latent_BCHW.norm()
        points.append(SkipPoint(t, took[str(t)], saved_SK.sum().item() / whole, difference.item(), saved_SK))
    return points
