"""Demo: data preparation, two stages of training and sampling on captioned shapes, on a CPU in minutes (`make demo`).

Every step is a command that a user would type; it is printed before it runs. Pictures, data and checkpoints that exist are
used again, so a stopped demo continues.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from PIL import Image

from data_prep.common.command import command_parser
from data_prep.shapes import KINDS, Scene, check, edge_distance, scenes
from data_prep.shapes_checker import by_figure, judge
from pretrain.curves import curve

TARS, DATA, STAGES, OUT = "data/demo_tars", "data/demo", ("demo_256", "demo_512"), Path("runs/demo_512/samples")
PICTURES, SMALL_SHARE, PER_TAR = 1600, 0.5, 80
# A single object has 30 outlines to be learned, several of a kind have six.
TRAINED_KINDS = ("one", "pair", "one", "pair", "count")
HELD_OUT = "data.validation=0.05"  # by its name, one of the twenty tars: 80 pictures
PROCESSES = 2  # of the training
PROMPTS, PROMPT_SEED = 64, 1000  # another seed than the training pictures have
REFERENCE = Path("docs/reference")  # what is normal; where the demo is not run in a checkout, nothing says it


def main(argv: list[str] | None = None) -> int:
    """Runs the commands in turn and prints a report; a failing command ends the program."""
    command_parser((__doc__ or "").splitlines()[0]).parse_args(argv)
    start = time.monotonic()
    python = sys.executable
    asked = list(scenes(PROMPTS, PROMPT_SEED))
    OUT.mkdir(parents=True, exist_ok=True)
    prompts = OUT / "demo_prompts.txt"
    prompts.write_text("".join(f"{s.caption}\n" for s in asked))
    draw = [python, "-m", "pretrain.sample", "--run", f"runs/{STAGES[-1]}"]
    commands = [
        *data_commands(TARS, DATA, PICTURES, SMALL_SHARE, PER_TAR, TRAINED_KINDS),
        *(training_command(stage, HELD_OUT) for stage in STAGES),
        [*draw, "--prompts", str(prompts), "--out", str(OUT), "--overwrite"],
    ]
    for command in commands:
        seconds = run(command)
        print(f"  ({seconds:.0f} s)", flush=True)
    print(report(asked, time.monotonic() - start))
    for stage in STAGES:
        if (reference := REFERENCE / f"{stage}.csv").is_file():
            run([python, "-m", "pretrain.compare.reference", "check", str(reference), f"runs/{stage}"])
    return 0


def data_commands(
    tars: str, data: str, pictures: int, small_share: float, per_tar: int, kinds: Sequence[str] = KINDS
) -> list[list[str]]:
    """The commands that make a data set of captioned shapes; tars that are there are taken as they are."""
    there = (Path(data) / "dataset.json").exists() and Path(tars).exists()
    python = [sys.executable, "-m"]
    count = ["--pictures", str(pictures), "--small-share", f"{small_share:g}", "--per-tar", str(per_tar)]
    draw = [*python, "data_prep.shapes", "--output", tars, *count, "--kinds", *kinds]
    encode = [*python, "data_prep.encode", "--input", f"{tars}/*.tar", "--output", data, "--encoders", "tiny"]
    return [encode] if there else [draw, encode]


def training_command(*words: str) -> list[str]:
    """The command that trains in PROCESSES processes; `words` are a config and its overrides."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}"]
    return [*launcher, "-m", "pretrain.train", *words]


def run(command: list[str]) -> float:
    """Prints and runs a command; a failure ends the demo. Returns the seconds that it took."""
    print(f"\n$ {' '.join(['python', *command[1:]])}", flush=True)
    start = time.monotonic()
    # The training processes share the cores: threads beyond them would wait for each other.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // PROCESSES))}
    training = "torch.distributed.run" in command
    status = subprocess.run(command, env={**os.environ, **threads} if training else None).returncode
    if status:
        sys.exit(f"demo: this command failed with exit code {status}; mend its cause and run `make demo` again")
    return time.monotonic() - start


def report(asked: list[Scene], seconds: float) -> str:
    """Summary: what the pictures show of their captions, the loss curves, time, memory, and paths of the results."""
    from data_prep.pictures.grids import labelled_grid  # late: it imports torch

    drawn = [json.loads(line)["file"] for line in (OUT / "prompts.jsonl").read_text().splitlines()]
    images = [Image.open(OUT / name).convert("RGB") for name in drawn]
    figures = by_figure(judge(image, scene).figures for image, scene in zip(images, asked, strict=True))
    strict = [check(image, scene) for image, scene in zip(images, asked, strict=True)]
    distances = [edge_distance(image, scene) * image.width for image, scene in zip(images, asked, strict=True)]
    grid = OUT / "grid.png"
    shown = range(24)
    labelled_grid([images[i] for i in shown], [asked[i].caption for i in shown], side=224, columns=6).save(grid)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    lines = [
        "",
        *(loss_line(stage, tag) for stage in STAGES for tag in ("train/loss", "validation/loss")),
        "",
        "pictures that are as the caption says (data_prep/shapes_checker.py)",
        *(f"  {name.replace('_', ' '):<20}{_share(values)}" for name, values in figures.items()),
        "by the strict measure (data_prep/shapes.py)",
        f"  {'colours':<20}{_share([r.colours for r in strict])}",
        f"  {'shapes':<20}{_share([r.shapes for r in strict if r.shapes is not None])}",
        f"  {'edges':<20}{sum(distances) / len(distances):.1f} px from their places, on average",
        f"time {seconds / 60:.1f} minutes, peak memory {memory:.1f} GiB in a process",
        "",
        f"pictures:    {grid}",
        f"TensorBoard: {Path(sys.executable).parent / 'tensorboard'} --logdir runs",
    ]
    return "\n".join(lines)


def _share(right: list[bool]) -> str:
    """Share of true values, such as 0.750 (3 of 4)."""
    return f"{sum(right) / len(right):.3f} ({sum(right)} of {len(right)})"


def loss_line(stage: str, tag: str) -> str:
    """Loss of a stage in at most eight numbers, each the mean over an eighth of its curve."""
    values = list(curve(Path("runs") / stage, tag).values())
    edges = [round(i * len(values) / 8) for i in range(9)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges) if b > a]
    return f"{stage}  {tag:<15}  " + " → ".join(f"{m:.3f}" for m in means)


if __name__ == "__main__":
    sys.exit(main())
