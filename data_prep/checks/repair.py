"""Repair of a data set: damaged parts are removed and encoded again by the commands that made them."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep import schema
from data_prep.checks.damage import Damage, Files
from data_prep.inputs.sources import Job
from data_prep.worker.changes import difference_of
from data_prep.worker.commands import FOLDER, SavedCommand
from data_prep.worker.parts import read_part_report, remove_part

Run = tuple[SavedCommand, list[str]]  # a command with all of its arguments


@dataclass(frozen=True)
class EncodeCommand:
    """The encode command as the repair needs it: functions of a command line's arguments."""

    main: Callable[[list[str]], int]  # runs it, and returns its exit code
    jobs: Callable[[list[str]], list[Job]]  # lists its tars


def repair(files: Files, work: Path, damages: list[Damage], more: list[str], encode: EncodeCommand) -> None:
    """Removes the damaged parts and runs the commands that make them; these write the files over all parts, too.

    Args:
        files: the data set's files.
        work: the folder with reports and commands: the data set's or, of a remote one, its local work folder.
        damages: the damages that the check found.
        more: further options for encode.py.
        encode: the encode command.

    Raises:
        ValueError: it cannot be done; nothing was removed then, unless no command is kept.
    """
    work = work.resolve()
    damaged = {d.part for d in damages if d.part}
    commands = SavedCommand.load_all(work)
    output = [f"--output={files.data}", f"--work={work}"] if files.remote else [f"--output={work}"]
    runs = [(command, [*command.arguments, *output, *more]) for command in commands]
    if commands:
        needed = _needed(runs, work, damaged, {d.file for d in damages}, encode)
        runs = runs if any(d.file == schema.CARD for d in damages) else needed or runs[:1]
    for name in sorted(damaged):
        _remove_part(files, work, name)
    _remove_files(work, {d.file for d in damages if d.part is None}, card=bool(commands))
    if not commands:
        raise ValueError(
            f"{work / FOLDER} does not say how this data set was made; {len(damaged)} damaged parts were taken "
            "out: run encode.py on it again by hand, which makes what is missing"
        )
    for command, arguments in runs:
        print(f"cd {shlex.quote(command.directory)} && python data_prep/encode.py {shlex.join(arguments)}", flush=True)
        with command.in_directory():
            if encode.main(arguments):
                raise ValueError("encode.py did not come to its end: see above, and run this again")


def _needed(
    runs: list[Run], work: Path, damaged: set[str], damaged_files: set[str], encode: EncodeCommand
) -> list[Run]:
    """The commands that make the damaged parts. Raises ValueError where the tar of one is gone or was replaced."""
    needed: list[Run] = []
    found: set[str] = set()
    problems: list[str] = []
    for command, arguments in runs:
        with command.in_directory(), contextlib.suppress(FileNotFoundError):
            jobs = [job for job in encode.jobs(arguments) if job.name in damaged - found]
            for job in jobs:
                believed = f"{schema.REPORTS}/{job.name}.json" not in damaged_files
                report = read_part_report(work, job.name) if believed else None
                if report is not None and (difference := difference_of(job, report)):
                    problems.append(difference)
            needed += [(command, arguments)] if jobs else []
            found |= {job.name for job in jobs}
    if gone := sorted(damaged - found):
        problems.append(f"no tar is found any more for {', '.join(gone)}")
    if problems:
        raise ValueError("nothing was removed, as it cannot be made again: " + "; ".join(problems))
    return needed


def _remove_part(files: Files, work: Path, name: str) -> None:
    """Removes a part from object storage, if the data set lies there, and from the local folder."""
    source, part = name.split("/")
    if files.remote is not None:
        paths = [file.split("/") for file in files.sizes]
        folders = {f"{source}/{p[1]}/{part}" for p in paths if len(p) == 4 and (p[0], p[2]) == (source, part)}
        for target in (f"{schema.REPORTS}/{name}.json", f"{schema.REPORTS}/{name}.jsonl", *sorted(folders)):
            files.remote.remove(target)
    remove_part(work, name)


def _remove_files(work: Path, damaged: set[str], card: bool) -> None:
    """Removes the files that encode.py writes only where they are missing; a card stays if its settings can be read."""
    if schema.NULL_TEXT in damaged:
        (work / schema.NULL_TEXT).unlink(missing_ok=True)
    try:
        schema.Card.load(work)
    except FileNotFoundError:
        pass
    except ValueError:
        if card:
            (work / schema.CARD).unlink()
