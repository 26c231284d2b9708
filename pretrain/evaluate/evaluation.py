"""An evaluation's stages: pictures are drawn, then judged by each metric, then summed up.

Each stage does what is missing: after a kill the same command goes on, and the figures are the same. Several processes share the
pictures, each draws and judges its own; the last one to judge by a metric sums it up.
"""

from __future__ import annotations

import argparse
import sys

import torch

from data_prep.common.progress import Progress
from pretrain.evaluate.metric import Metric, NotRun, Scorer
from pretrain.evaluate.metrics import METRICS
from pretrain.evaluate.pictures import PictureSet, draw, of_folder
from pretrain.evaluate.records import Records
from pretrain.evaluate.report import Report


def run(args: argparse.Namespace) -> str:
    """The table of what was found, or what other processes have still to do."""
    from pretrain.sampling.device import device_of
    from pretrain.sampling.drawing import check_numbers, share_of_process

    check_numbers(args)
    if args.per_prompt < 1:
        raise ValueError(f"--per-prompt {args.per_prompt}: must be at least 1")
    problems = {}
    for name in args.metrics:
        try:
            METRICS[name]().check_prompts(args)
        except (ValueError, OSError) as error:  # the other metrics go on
            problems[name] = f"{name}: {error}"
    if len(problems) == len(args.metrics):
        raise ValueError("; ".join(problems.values()))
    args.out.mkdir(parents=True, exist_ok=True)
    found = of_folder(args.pictures, args.prompts, args.per_prompt) if args.pictures else draw(args)
    report, device = Report(args, found), device_of(args.device)
    for name in [name for name in args.metrics if name not in problems]:
        try:
            judge(name, METRICS[name](), args, device, share_of_process()[0], report)
        except (ValueError, OSError) as error:
            problems[name] = f"{name}: {error}"
    if pending := report.pending([name for name in args.metrics if name not in problems]):
        text = f"{', '.join(pending)}: pictures are left to other processes"
    else:
        text = report.finish()
    if problems:
        if len(problems) < len(args.metrics):
            print(text)
        raise ValueError("; ".join(problems.values()))
    return text


def judge(name: str, metric: Metric, args: argparse.Namespace, device: torch.device, rank: int, report: Report) -> None:
    """Judges this process's pictures; sums up where all are drawn and judged by now, as the last process finds them."""
    try:
        scorer = metric.build(args, device)
    except NotRun as missing:
        report.not_run(name, str(missing))
        return
    records = Records(args.out, name, scorer.identity, rank)
    score(name, scorer, records, report.found)
    found = report.found = report.found.completed()
    there = records.read(found.pictures)
    if not found.missing and len(there) == len(found.pictures):
        result = scorer.summarise(found.pictures, [there[str(p.path)] for p in found.pictures])
        report.add(name, result, scorer.identity)


def score(name: str, scorer: Scorer, records: Records, found: PictureSet) -> None:
    """Judges those of this process's pictures that have no record yet."""
    mine = [found.pictures[i] for i in found.mine]
    there = records.read(mine)
    todo = [p for p in mine if str(p.path) not in there]
    if not todo:
        return
    print(f"{name}: {len(todo)} of {len(mine)} pictures to judge", file=sys.stderr, flush=True)
    with Progress(len(todo), "picture", line_seconds=10.0) as progress:
        for i in range(0, len(todo), scorer.batch):
            some = todo[i : i + scorer.batch]
            records.write(some, scorer.score(some))
            progress.update(len(some))
