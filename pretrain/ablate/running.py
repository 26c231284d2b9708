"""Running a study: which cells, how many at once, and the table of those that are done."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_prep.common.progress import Progress
from pretrain.ablate.cells import Cell, Judging, shapes_prompts
from pretrain.ablate.report import write
from pretrain.ablate.study import DATA, PER_TAR, PICTURES, Scale, Study
from pretrain.demo import data_commands


def run(study: Study, args: argparse.Namespace) -> str:
    """The table of the cells that are done, or the list of all."""
    if args.scale not in study.scales:
        raise ValueError(f"--scale {args.scale}: {args.study} has {', '.join(study.scales)}")
    if args.jobs < 1 or args.processes < 1:
        raise ValueError("--jobs and --processes must be at least 1")
    scale = study.scales[args.scale]
    out = args.out or Path(f"runs/{args.study}_{args.scale}")
    cells = cells_of(study, scale, args, out)
    judging = judging_of(scale, args, out)
    trainings = list(dict.fromkeys(cell.trained.folder for cell in cells))
    if args.list:
        return "\n".join(listed(trainings.index(cell.trained.folder), cell, judging, args.processes) for cell in cells)
    if args.cell is not None and not 0 <= args.cell < len(trainings):
        raise ValueError(f"--cell {args.cell}: there are 0 to {len(trainings) - 1}; --list names them")
    out.mkdir(parents=True, exist_ok=True)
    if args.prompts is None:
        shapes_prompts(judging.prompts, scale.prompts)
    if "data.path" not in " ".join(args.set) and scale.config.startswith("demo"):
        make_data()
    run_all([c for c in cells if args.cell in (None, trainings.index(c.trained.folder))], judging, args)
    return write(study, done(cells), out)


def cells_of(study: Study, scale: Scale, args: argparse.Namespace, out: Path) -> list[Cell]:
    """The cells by seed, so that the first seed's table is there first. Raises ValueError for an unknown row."""
    rows = args.rows or list(study.rows)
    if unknown := [row for row in rows if row not in study.rows]:
        raise ValueError(f"--rows {' '.join(unknown)}: the rows are {', '.join(study.rows)}")
    seeds = scale.seeds if args.seeds is None else args.seeds
    return [Cell(study, scale, row, seed, out, tuple(args.set)) for seed in seeds for row in rows]


def judging_of(scale: Scale, args: argparse.Namespace, out: Path) -> Judging:
    """How the pictures are judged. Raises ValueError where the scale has no prompts, and none are given."""
    if args.prompts is None and not scale.prompts:
        raise ValueError(f"--scale {args.scale} needs --prompts and --metrics: {scale.about}")
    return Judging(args.prompts or out / "prompts.txt", args.metrics, shlex.split(args.evaluate))


def listed(number: int, cell: Cell, judging: Judging, processes: int) -> str:
    """A cell's line and its commands, or why they are not known yet."""
    try:
        commands = [shlex.join(["python", *command[1:]]) for command in cell.commands(judging, processes)]
    except ValueError as error:
        commands = [str(error)]
    return "\n  ".join([f"{number}  {cell.name}, seed {cell.seed}: {cell.row.label}", *commands])


def run_all(cells: Sequence[Cell], judging: Judging, args: argparse.Namespace) -> None:
    """Runs cells, some at once, those that need another's training after it. Raises RuntimeError for those that failed."""
    threads = max(1, (os.cpu_count() or 1) // (args.jobs * args.processes))
    failed: list[str] = []
    there = [cell for cell in cells if cell.is_there]
    with Progress(len(cells), "cell", done=len(there)) as progress, ThreadPoolExecutor(args.jobs) as pool:

        def one(cell: Cell) -> None:
            try:
                cell.run(judging, args.processes, threads)
            except (RuntimeError, ValueError) as error:  # the others go on
                failed.append(str(error))
            if cell not in there:
                progress.update()

        # Those that draw from another row's training, or take its time, come after it.
        for own, timed in ((True, False), (True, True), (False, False)):
            now = [c for c in cells if (c.row.trained_as is None) is own and (c.row.equal == "seconds") is timed]
            list(pool.map(one, now))
    if failed:
        raise RuntimeError("; ".join(failed))


def done(cells: Sequence[Cell]) -> Mapping[str, Mapping[int, Mapping[str, Any]]]:
    """The cells that are done, by row and seed."""
    found: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for cell in cells:
        if (figures := cell.finished) is not None:
            found[cell.name][cell.seed] = figures
    return found


def make_data() -> None:
    """The studies' own data set of captioned shapes, where it is not there. Raises RuntimeError where it cannot be made."""
    if Path(DATA, "dataset.json").exists():
        return
    *draw, encode = data_commands(f"{DATA}_tars", DATA, PICTURES, 1, PER_TAR)
    for command in [*draw, [*encode, "--features", "tiny"]]:
        if subprocess.run(command).returncode:
            raise RuntimeError(f"the data could not be made: {shlex.join(command)}")
