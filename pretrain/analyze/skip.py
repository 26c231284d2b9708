"""Skipping FFNs by their query masks (FocusDiT, Fig. 9) with a trained run: time, FLOPs saved and deviation over the threshold.

All pictures are drawn as one batch at each threshold, in turn, and timed without the VAE (the paper: 16 pictures). `skip.csv`
has a line for each unit (`layer` is the paper's) and threshold: median seconds, the share of the FFNs' FLOPs that was left out,
and the relative deviation of the latents from those without skipping.
"""

from __future__ import annotations

import argparse

from data_prep.common.paths import path
from pretrain.analyze.subject import Subject, drawing_arguments, read_subject, write
from pretrain.bench import skip
from pretrain.diffusion import start_noise
from pretrain.models import PackedText
from pretrain.sampling.options import require_at_least
from pretrain.sampling.plots import plot_skip

THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
HEADER = ("unit", "threshold", "seconds", "ffn_flops_saved", "latent_deviation")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--run", type=path, required=True, help="run directory of a model with query masks")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="of the query mask, 0 to 1"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that each threshold is timed; the median counts")
    drawing_arguments(parser, pictures=16, batch=None)


def run(args: argparse.Namespace) -> str:
    """Draws and times; writes figure and table. Returns the table as text."""
    require_at_least({"--rounds": (args.rounds, 1)})
    if wrong := [t for t in args.thresholds if not 0 <= t <= 1]:
        raise ValueError(f"--thresholds {wrong[0]}: must be in 0..1, as the query masks are")
    subject = timed_subject(read_subject(args, args.run, str(args.run)))
    curves = skip.measure(subject, args.rounds, lambda masks, unit: sorted(set(args.thresholds)))
    rows = [[unit, p.threshold, p.seconds, p.saved, p.deviation] for unit, points in curves.items() for p in points]
    closing = write(args.out or args.run / "analyze", "skip", plot_skip(curves), HEADER, rows)
    return f"{skip.table(subject, curves)}\n{closing}"


def timed_subject(subject: Subject) -> skip.Subject:
    """The prompts of an analysis as one batch that the benchmark times."""
    pipeline, dit = subject.pipeline, subject.dit
    device, dtype = pipeline.device, dit.final.proj.weight.dtype
    text, null = (
        dit.encode_text(PackedText.pack(pipeline.encode_prompt(prompts)).to(device, dtype))
        for prompts in (subject.prompts, [""])
    )
    seeds = range(subject.seed, subject.seed + len(subject.prompts))
    noise = start_noise(seeds, (dit.config.latent_channels, *pipeline.latent_size())).to(device)
    name = f"{subject.name}, {len(subject.prompts)} pictures of {pipeline.config.resolution} px"
    return skip.Subject(name, dit, text, null, noise, pipeline.scheduler, subject.guidance, subject.steps)
