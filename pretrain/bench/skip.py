"""Skipping FFNs by their query masks (FocusDiT, Fig. 9): time, FLOPs saved and deviation over the threshold.

With `--run`, the pictures of a trained model; without, a backbone of random weights at any size, whose masks are spread over
0..1, which serves to measure time. The FFNs' own time is what is saved when every token is left out (a threshold of 1).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

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
from pretrain.sampling.prompts import read_prompts
from pretrain.schedulers import build_scheduler, set_timesteps


@dataclass(frozen=True)
class Subject:
    """A backbone, its captions, and the settings of its sampling."""

    name: str
    model: DiT
    text: TextCache
    null: TextCache
    noise: Tensor
    objective: str
    shift: float
    guidance: float


def arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser, preset="focusdit_1b_shared2d", batch=1, rounds=5)
    parser.add_argument("--run", type=Path, help="run directory of a trained model; instead of random weights")
    parser.add_argument("--prompts", type=Path, help="with --run: file of captions (the first --batch are drawn)")
    parser.add_argument("--steps", type=int, default=1, help="sampling steps")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", help="default: 0 to 1; random weights: by quantiles of the masks"
    )
    parser.add_argument("--out", type=Path, help="folder for skip.png and skip.json (FLOPs saved by step and block)")


def run(args: argparse.Namespace) -> str:
    """The table; writes plot and counts where asked."""
    device = torch.device(args.device)
    with torch.no_grad():
        subject = _trained(args, device) if args.run else _random(args, device)
        plain = _sample(subject, args.steps, None, keep_masks=True)
        curves = {}
        for unit in UNITS:
            thresholds = args.thresholds or _thresholds(plain.masks_BSKN, bool(args.run), unit)
            curves[unit] = _curve(subject, args, unit, thresholds, plain, device)
    lines = [f"{subject.name}; {args.steps} steps, guidance {subject.guidance}, {device.type}"]
    for unit, points in curves.items():
        none, every = points[0], points[-1]
        lines.append(
            f"  {unit:<7}{'threshold':>10}{'seconds':>10}{'FFN FLOPs saved':>17}{'FFN time saved':>16}{'deviation':>11}"
        )
        for p in points:
            time_saved = (none.seconds - p.seconds) / max(none.seconds - every.seconds, 1e-9)
            saved = f"{100 * p.saved:>16.1f}%{100 * time_saved:>15.1f}%"
            lines.append(f"  {'':<7}{p.threshold:>10.3f}{p.seconds:>10.3f}{saved}{p.deviation:>11.4f}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        plot_skip(curves).save(args.out / "skip.png")
        counts = {u: [{**vars(p), "saved_SK": p.saved_SK.tolist()} for p in points] for u, points in curves.items()}
        (args.out / "skip.json").write_text(json.dumps(counts) + "\n")
        lines.append(f"see {args.out / 'skip.png'} and skip.json")
    return "\n".join(lines)


def _trained(args: argparse.Namespace, device: torch.device) -> Subject:
    from pretrain.sampling.trained_run import load_run  # imports DeepSpeed

    if args.prompts is None:
        raise ValueError("--run needs --prompts, a file of captions")
    trained = load_run(args.run, "ema", device)
    pipe, prompts = trained.pipeline, read_prompts(args.prompts)[: args.batch]
    model = pipe.transformer.dit
    dtype = model.final.proj.weight.dtype
    text, null = (model.encode_text(PackedText.pack(pipe.encode_prompt(p)).to(device, dtype)) for p in (prompts, [""]))
    noise = start_noise(range(len(prompts)), (model.config.latent_channels, *pipe.latent_size())).to(device)
    p = trained.config.preview
    name = f"{args.run}, step {trained.step}, {len(prompts)} pictures of {pipe.config.resolution} px"
    return Subject(name, model, text, null, noise, trained.config.objective.name, p.shift, p.guidance)


def _random(args: argparse.Namespace, device: torch.device) -> Subject:
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
    return Subject(name, model, text, null, noise, "flow", 3.0, 5.5)


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


def _thresholds(masks_BSKN: Tensor | None, trained: bool, unit: str) -> list[float]:
    """Round numbers for a trained model, as in the paper; else what leaves out a tenth, a quarter, half, … of the work."""
    if masks_BSKN is None:
        raise ValueError("this model has no query masks, so there is nothing to skip by")
    if trained:
        return [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
    judged = masks_BSKN if unit == "token" else masks_BSKN.mean(-1)
    return [0.0, *judged.flatten().quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])).tolist(), 1.0]


def _sample(subject: Subject, steps: int, skip: Skip | None, keep_masks: bool = False) -> Generated:
    scheduler = build_scheduler(subject.objective, subject.shift)
    set_timesteps(scheduler, steps, subject.noise.device)
    s, dtype = subject, subject.model.final.proj.weight.dtype
    times = s.model.embed_times(scheduler.timesteps)
    return generate(s.model, s.text, s.null, times, s.noise, scheduler, Guidance(s.guidance), dtype, skip, keep_masks)


def _curve(
    subject: Subject,
    args: argparse.Namespace,
    unit: str,
    thresholds: list[float],
    plain: Generated,
    device: torch.device,
) -> list[SkipPoint]:
    """Every threshold, timed in turn."""
    skips = {t: Skip(t, unit) for t in thresholds}
    runs = {str(t): lambda skip=skip: _sample(subject, args.steps, skip) for t, skip in skips.items()}
    took = side_by_side(runs, args.rounds, device)
    config = subject.model.config
    points = []
    for t, skip in skips.items():
        drawn = _sample(subject, args.steps, skip)
        assert drawn.work is not None
        saved_SK = saved_flops(config, drawn.work.kept_SK, drawn.work.tokens_SK)
        whole = saved_flops(config, torch.zeros(1), drawn.work.tokens_SK).sum().item()
        difference = (drawn.latent_BCHW - plain.latent_BCHW).norm() / plain.latent_BCHW.norm()
        points.append(SkipPoint(t, took[str(t)], saved_SK.sum().item() / whole, difference.item(), saved_SK))
    return points
