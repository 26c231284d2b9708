"""Following a training: each kept checkpoint of a run is evaluated once, while the training goes on; its files are only read.

    OUT/step_00005000/     an evaluation, as `--step 5000` makes it

It ends with the evaluation of the last checkpoint once the training is complete. A checkpoint that the training removes
before it is evaluated is named and left.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from data_prep.common.words import counted
from pretrain.checkpoint import reader as checkpoint
from pretrain.config import kept_config
from pretrain.evaluate import evaluation
from pretrain.evaluate.report import read


def follow(args: argparse.Namespace) -> str:
    """Evaluates the checkpoints of the steps that `args.every` divides, and those to come; returns a closing line.

    Raises:
        ValueError: numbers without a meaning; an evaluation failed, though its checkpoint is there.
    """
    if args.run is None:
        raise ValueError("--every: follows the training of --run; give --run")
    if args.step is not None:
        raise ValueError("--every and --step: give one of them")
    if args.every < 1 or args.poll <= 0:
        raise ValueError(f"--every {args.every} --poll {args.poll:g}: must be at least 1, and above 0")
    run = checkpoint.find_run(str(args.run), "config.yaml")  # its first checkpoint may be to come
    between = kept_config(run).checkpoint.every
    if args.every % between:
        raise ValueError(f"--every {args.every}: {run} has checkpoint.every={between}; give a multiple of that")
    evaluated, left = 0, set[int]()
    while True:
        newest = max(checkpoint.steps(run), default=0)  # before the evaluations: none is missed by ending
        while todo := [step for step in _due(run, args.every) if step not in left and not _is_done(args, step)]:
            if _evaluate(args, run, todo[0]):
                evaluated += 1
            left.add(todo[0])
        if newest >= kept_config(run).steps:
            return (
                f"{run} is complete at step {newest}: {counted(evaluated, 'checkpoint')} evaluated now, in {args.out}"
            )
        time.sleep(args.poll)


def _due(run: Path, every: int) -> list[int]:
    return [step for step in checkpoint.steps(run) if step % every == 0]


def _out(args: argparse.Namespace, step: int) -> Path:
    return Path(args.out / checkpoint.step_name(step))


def _is_done(args: argparse.Namespace, step: int) -> bool:
    """Whether all metrics have their result of a checkpoint."""
    results = [_out(args, step) / f"{name}.json" for name in args.metrics]
    return all(path.is_file() and read(path)["status"] == "done" for path in results)


def _evaluate(args: argparse.Namespace, run: Path, step: int) -> bool:
    """Evaluates a checkpoint; False where the training has removed it meanwhile."""
    print(f"step {step} of {run}", flush=True)
    try:
        print(evaluation.run(argparse.Namespace(**vars(args) | {"step": step, "out": _out(args, step)})), flush=True)
    except (ValueError, OSError):
        if step in checkpoint.steps(run):
            raise
        print(f"step {step}: the training has removed this checkpoint; it is left out", file=sys.stderr, flush=True)
        return False
    return True
