"""The whole path on captioned shapes, on a CPU in minutes: `make demo`.

Every step is a command that a user would type; it is printed before it runs. What is already there is not made again, and a
stopped demo goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.pictures.grids import labelled_grid
from data_prep.shapes import KINDS, Scene, check, scenes

TARS, DATA, STAGES, OUT = "data/demo_tars", "data/demo", ("demo_256", "demo_512"), Path("runs/demo_512/samples")
PICTURES = 800
PROCESSES = 2  # that train
PROMPTS, PROMPT_SEED = 64, 1000  # not the seed of the training pictures


def main() -> int:
    """Runs the commands in turn and prints what came out; a failing command ends the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.parse_args()
    start = time.monotonic()
    python = sys.executable
    wanted = list(scenes(PROMPTS, PROMPT_SEED))
    OUT.mkdir(parents=True, exist_ok=True)
    prompts = OUT / "demo_prompts.txt"
    prompts.write_text("".join(f"{s.caption}\n" for s in wanted))
    draw = [python, "-m", "pretrain.sample", "--run", f"runs/{STAGES[-1]}"]
    commands = [
        [python, "data_prep/shapes.py", "--output", TARS, "--pictures", str(PICTURES)],
        [python, "data_prep/encode.py", "--input", f"{TARS}/*.tar", "--output", DATA, "--encoders", "tiny"],
        *map(launch, STAGES),
        [*draw, "--prompts", str(prompts), "--out", str(OUT), "--overwrite"],
    ]
    if (Path(DATA) / "dataset.json").exists() and Path(TARS).exists():
        commands.pop(0)
    for command in commands:
        took = run(command)
        print(f"  ({took:.0f} s)", flush=True)
    print(report(wanted, time.monotonic() - start))
    return 0


def launch(*words: str) -> list[str]:
    """The command of a training in as many processes as the demo uses."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}"]
    return [*launcher, "-m", "pretrain.train", *words]


def run(command: list[str]) -> float:
    """Prints and runs a command; a failure ends the demo. Returns seconds."""
    print(f"\n$ {' '.join(['python', *command[1:]])}", flush=True)
    start = time.monotonic()
    # The training processes share the cores: threads beyond them would wait for each other.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // PROCESSES))}
    share = "torch.distributed.run" in command
    status = subprocess.run(command, env={**os.environ, **threads} if share else None).returncode
    if status:
        sys.exit(f"demo: this command failed with exit code {status}; mend its cause and run `make demo` again")
    return time.monotonic() - start


def report(wanted: list[Scene], seconds: float) -> str:
    """What came out: colours and shapes read back from the pictures, the loss curves, and where to look."""
    drawn = [json.loads(line)["file"] for line in (OUT / "prompts.jsonl").read_text().splitlines()]
    images = [Image.open(OUT / name).convert("RGB") for name in drawn]
    verdicts = [check(image, scene) for image, scene in zip(images, wanted, strict=True)]
    grid = OUT / "grid.png"
    shown = range(24)
    labelled_grid([images[i] for i in shown], [wanted[i].caption for i in shown], side=224, columns=6).save(grid)
    countable = [v.shapes for v in verdicts if v.shapes is not None]
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    lines = [
        "",
        *(loss_line(stage) for stage in STAGES),
        "",
        f"foreground and background colours as the prompt says: {_share([v.colours for v in verdicts])}",
        *(f"  {kind}: {_share([v.colours for v in verdicts[i :: len(KINDS)]])}" for i, kind in enumerate(KINDS)),
        f"shapes too (where each object has its own colour): {_share(countable)}",
        f"time {seconds / 60:.1f} minutes, peak memory {memory:.1f} GiB in each of {PROCESSES} processes",
        "",
        f"pictures:    {grid}",
        f"TensorBoard: {Path(sys.executable).parent / 'tensorboard'} --logdir runs",
    ]
    return "\n".join(lines)


def _share(right: list[bool]) -> str:
    return f"{sum(right) / len(right):.3f} ({sum(right)} of {len(right)})"


def curve(run_dir: Path, tag: str) -> dict[int, float]:
    """A curve of a run, by step."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {e.step: e.value for e in events.Scalars(tag)}


def loss_line(stage: str) -> str:
    """A stage's loss at eight points of its curve, each a mean over an eighth of it."""
    values = list(curve(Path("runs") / stage, "train/loss").values())
    edges = [round(i * len(values) / 8) for i in range(9)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges) if b > a]
    return f"{stage}  train/loss  " + " → ".join(f"{m:.3f}" for m in means)


if __name__ == "__main__":
    sys.exit(main())
