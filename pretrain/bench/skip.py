"""Skipping FFNs by their query masks (FocusDiT, Fig. 9): time, FLOPs saved and deviation over the threshold.

With `--run`, the pictures of a trained model; without, a backbone of random weights at any size, whose masks are spread over
0..1, which serves to measure time. The FFNs' own time is what is saved when every token is left out (a threshold of 1).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pretrain.bench.timing import model_arguments, side_by_side
from pretrain.diffusion import Generated, Guidance, generate, start_noise
from pretrain.models import DiT, PackedText, Skip, TextMemory, preset
from pretrain.models.cost import ffn_flops
from pretrain.models.skip import UNITS
from pretrain.pipeline import build_scheduler, set_timesteps
from pretrain.plots import SkipPoint, plot_skip


@dataclass(frozen=True)
class Subject:
    """What is sampled: a backbone, its captions, and how."""

    name: str
    model: DiT
    text: TextMemory
    null: TextMemory
    noise: Tensor
    objective: str
    shift: float
    guidance: float


def arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser, preset="focusdit_1b_shared2d", batch=1, rounds=3)
    parser.add_argument("--run", type=Path, help="run directory of a trained model; instead of random weights")
    parser.add_argument("--prompts", type=Path, help="with --run: file of captions (the first --batch are drawn)")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", help="default: 0 to 1; random weights: by quantiles of the masks"
    )
    parser.add_argument("--plot", type=Path, help="PNG to write")


def run(args: argparse.Namespace) -> str:
    """The table; writes the plot where asked."""
    device = torch.device(args.device)
    with torch.no_grad():
        subject = _trained(args, device) if args.run else _random(args, device)
        plain = _sample(subject, args.steps, None, keep_masks=True)
        thresholds = args.thresholds or _thresholds(plain.masks_BSKN, bool(args.run))
        curves = {unit: _curve(subject, args, unit, thresholds, plain, device) for unit in UNITS}
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
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_skip(curves).save(args.plot)
        lines.append(f"plot: {args.plot}")
    return "\n".join(lines)


def _trained(args: argparse.Namespace, device: torch.device) -> Subject:
    from pretrain.trained import load_run, read_prompts  # imports DeepSpeed

    if args.prompts is None:
        raise ValueError("--run needs --prompts, a file of captions")
    trained = load_run(args.run, "ema", device)
    pipe, prompts = trained.pipeline, read_prompts(args.prompts)[: args.batch]
    model = pipe.transformer.dit
    dtype = model.final.proj.weight.dtype
    text, null = (model.read(PackedText.pack(pipe.encode_prompt(p)).to(device, dtype)) for p in (prompts, [""]))
    noise = start_noise(range(len(prompts)), (model.config.latent_channels, *pipe.latent_size())).to(device)
    p = trained.config.preview
    name = f"{args.run}, step {trained.step}, {len(prompts)} pictures of {pipe.config.resolution} px"
    return Subject(name, model, text, null, noise, trained.config.objective.name, p.shift, p.guidance)


def _random(args: argparse.Namespace, device: torch.device) -> Subject:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = replace(preset(args.preset), depth=args.depth) if args.depth else preset(args.preset)
    torch.manual_seed(0)
    model = DiT(config).to(device, dtype).eval()
    spread_masks(model)
    side = args.tokens_per_side * config.patch
    captions = [torch.randn(80, config.text_width, device=device, dtype=dtype) for _ in range(args.batch)]
    text, null = model.read(PackedText.pack(captions)), model.read(PackedText.pack([captions[0][:1]]))
    noise = start_noise(range(args.batch), (config.latent_channels, side, side)).to(device)
    name = (
        f"{args.preset}, random weights: width {config.width}, depth {config.depth}, {args.tokens_per_side**2} tokens, "
        f"{args.batch} pictures"
    )
    return Subject(name, model, text, null, noise, "flow", 3.0, 5.5)


def spread_masks(model: DiT) -> None:
    """Random weights whose query masks lie all over 0..1 and whose FFNs change the tokens, as a trained model's do."""
    for number, block in enumerate(model.blocks):
        torch.nn.init.xavier_uniform_(block.ffn.value.weight)  # type: ignore[union-attr, arg-type]
        last = block.query_mask.last.linear  # type: ignore[union-attr]
        last.weight.mul_(40)  # type: ignore[operator, union-attr]
        last.bias.fill_(0.5 if number % 2 else -0.5)  # type: ignore[operator, union-attr]
    if model.shared_expert is not None:
        torch.nn.init.xavier_uniform_(model.shared_expert.value.weight)


def _thresholds(masks: Tensor | None, trained: bool) -> list[float]:
    """Round numbers for a trained model, as in the paper; else what leaves out a tenth, a quarter, half, … of the tokens."""
    if masks is None:
        raise ValueError("this model has no query masks, so there is nothing to skip by")
    if trained:
        return [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
    quantiles = masks.flatten().quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    return [0.0, *quantiles.tolist(), 1.0]


def _sample(subject: Subject, steps: int, skip: Skip | None, keep_masks: bool = False) -> Generated:
    scheduler = build_scheduler(subject.objective, subject.shift)
    set_timesteps(scheduler, steps, subject.noise.device)
    s, dtype = subject, subject.model.final.proj.weight.dtype
    return generate(s.model, s.text, s.null, s.noise, scheduler, Guidance(s.guidance), dtype, skip, keep_masks)


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
    per_token = torch.tensor(ffn_flops(subject.model.config), dtype=torch.float64)
    points = []
    for t, skip in skips.items():
        drawn = _sample(subject, args.steps, skip)
        assert drawn.work is not None
        done = (drawn.work.kept_SK * per_token).sum().item()
        whole = (drawn.work.tokens_S[:, None] * per_token).sum().item()
        difference = (drawn.latent_BCHW - plain.latent_BCHW).norm() / plain.latent_BCHW.norm()
        points.append(SkipPoint(t, took[str(t)], 1 - done / whole, difference.item()))
    return points
