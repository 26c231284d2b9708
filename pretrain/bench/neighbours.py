"""Trains the methods on the captioned shapes, at equal images and at equal FLOPs: one table of loss,
pictures and time.

The models are the deep tiny one with other settings, trained on the demo's data (made here where it is missing). The learning
rate is constant after warm-up, so that one run serves both comparisons: what is drawn after `--steps` steps has seen as many
images, what is drawn after `--steps` × (the baseline's FLOPs / its own) has cost as much. Loss: the mean over the last tenth.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_prep.encoders import DOWNSAMPLE
from data_prep.shapes import check, scenes
from data_prep.shapes_checker import by_figure, judge, mean_of_tasks
from pretrain.config import load
from pretrain.curves import curve
from pretrain.demo import DATA, PROMPT_SEED, data_commands, training_command
from pretrain.demo import run as run_command
from pretrain.models.cost import count_flops, grid_of

MASKED, FLEXDIT = ["model.mask=adaln_single", "model.ffn=shared"], ["model.density=flexdit"]
MODELS = {
    "baseline": [],
    "FocusDiT": MASKED,
    "FlexDiT": FLEXDIT,
    "mediators": ["model.attention=mediators"],
    "FocusDiT + FlexDiT": MASKED + FLEXDIT,
}
CAPTION = 12  # tokens, about


@dataclass(frozen=True)
class Row:
    """A model after so many steps."""

    name: str
    steps: int
    loss: float
    tasks: float
    whole: float
    strict_colours: float
    strict_shapes: float
    step_s: float
    flops: float


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=900, help="optimizer steps for equal images")
    parser.add_argument("--prompts", type=int, default=96, help="pictures drawn of each")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("runs/neighbours"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of every training")


def run(args: argparse.Namespace) -> str:
    """The table, in Markdown."""
    make_data()
    args.out.mkdir(parents=True, exist_ok=True)
    costs = {name: flops_of(settings(name, args)) for name in args.models}
    baseline = flops_of(settings("baseline", args))
    rows = []
    for name in args.models:
        points = sorted({args.steps, round(args.steps * baseline / costs[name])})
        rows += [measured(name, steps, costs[name], args) for steps in points]
    return table(rows, args.steps, baseline)


def make_data() -> None:
    """The demo's tars and data set."""
    if not (Path(DATA) / "dataset.json").exists():
        for command in data_commands():
            run_command(command)


def settings(name: str, args: argparse.Namespace) -> list[str]:
    """The overrides of one model's training."""
    constant = ["optimizer.schedule=constant", "optimizer.lr=1.5e-3", "preview.every=0", "checkpoint.every=100000"]
    return ["model.preset=dit_tiny_deep", *constant, *MODELS[name], *args.set]


def flops_of(words: list[str]) -> float:
    """A picture's forward FLOPs, the mean over all noise levels."""
    config = load("demo_256", words)[0]
    backbone = config.model.backbone()
    return count_flops(backbone, grid_of(backbone, config.data.resolution, DOWNSAMPLE), CAPTION).total


def measured(name: str, steps: int, flops: float, args: argparse.Namespace) -> Row:
    """Trains (on) to this step, draws, and looks."""
    run_dir = args.out / name.replace(" ", "")
    run_command(training_command("demo_256", *settings(name, args), f"steps={steps}", f"run_dir={run_dir}"))
    wanted = list(scenes(args.prompts, PROMPT_SEED))
    prompts, drawn = args.out / "prompts.txt", run_dir / f"samples_{steps}"
    prompts.write_text("".join(f"{scene.caption}\n" for scene in wanted))
    draw = [
        "-m",
        "pretrain.sample",
        "--run",
        str(run_dir),
        "--prompts",
        str(prompts),
        "--out",
        str(drawn),
        "--overwrite",
    ]
    run_command([sys.executable, *draw])
    files = [json.loads(line)["file"] for line in (drawn / "prompts.jsonl").read_text().splitlines()]
    pictures = [Image.open(drawn / file).convert("RGB") for file in files]
    figures = by_figure(judge(picture, scene).figures for picture, scene in zip(pictures, wanted, strict=True))
    strict = [check(picture, scene) for picture, scene in zip(pictures, wanted, strict=True)]
    shapes = [verdict.shapes for verdict in strict if verdict.shapes is not None]
    losses = [value for step, value in curve(run_dir, "train/loss").items() if steps * 0.9 < step <= steps]
    seconds = [value for step, value in curve(run_dir, "speed/step_s").items() if step <= steps]
    return Row(
        name,
        steps,
        sum(losses) / len(losses),
        mean_of_tasks(figures),
        sum(figures["whole"]) / len(wanted),
        sum(verdict.colours for verdict in strict) / len(wanted),
        sum(shapes) / len(shapes),
        sorted(seconds)[len(seconds) // 2],
        flops,
    )


def table(rows: list[Row], steps: int, baseline: float) -> str:
    """Markdown."""
    lines = [
        "| model | FLOPs an image | step | equal | steps | training | loss | tasks | whole | strict colours | strict shapes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = next((row.step_s for row in rows if row.name == "baseline"), rows[0].step_s)
    for row in rows:
        equal = " and ".join(
            word
            for word, holds in (
                ("images", row.steps == steps),
                ("FLOPs", row.steps == round(steps * baseline / row.flops)),
            )
            if holds
        )
        lines.append(
            f"| {row.name} | {row.flops / baseline:.2f} | {row.step_s / first:.2f} | {equal} | {row.steps} | "
            f"{row.steps * row.step_s:.0f} s | {row.loss:.4f} | {row.tasks:.0%} | {row.whole:.0%} | "
            f"{row.strict_colours:.0%} | {row.strict_shapes:.0%} |"
        )
    return "\n".join(lines)
