"""Damaged parts out, and encode.py again: by the commands that it noted in the data set's work/encode/."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep import encode
from data_prep import schema as shards
from data_prep.checks.damage import Damage, Files
from data_prep.worker.parts import read_part_report, remove_part


@dataclass(frozen=True)
class Command:
    """How parts of the data set were made, as encode.py noted it."""

    file: Path
    directory: str
    arguments: list[str]
    output: str

    @classmethod
    def all_of(cls, work: Path) -> list[Command]:
        """The commands that a folder notes. Raises ValueError where one cannot be read."""
        found = []
        for file in sorted((work / encode.COMMANDS).glob("*.json")):
            try:
                found.append(cls(file, **json.loads(file.read_text(encoding="utf-8"))))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file} is damaged ({error}); remove it, and run encode.py again by hand") from error
        return found

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Within the folder that the command ran in."""
        if not Path(self.directory).is_dir():
            raise ValueError(f"{self.directory}, where encode.py ran ({self.file}), is gone; run it again by hand")
        before = os.getcwd()
        os.chdir(self.directory)
        try:
            yield
        finally:
            os.chdir(before)


Run = tuple[Command, list[str]]  # with all arguments for now


def repair(files: Files, work: Path, damages: list[Damage], more: list[str]) -> None:
    """Takes the damaged parts out and has encode.py make them; it writes what follows from all parts, too.

    `work` is where reports and commands lie: the data set's folder or, of a remote one, its local work folder. Raises
    ValueError where it cannot be done; nothing was removed then, unless no command is noted.
    """
    work = work.resolve()
    damaged = {d.part for d in damages if d.part}
    commands = Command.all_of(work)
    output = [f"--output={files.data}", f"--work={work}"] if files.remote else [f"--output={work}"]
    runs = [(command, [*command.arguments, *output, *more]) for command in commands]
    if commands:
        needed = _needed(runs, work, damaged, {d.file for d in damages})
        runs = runs if any(d.file == shards.CARD for d in damages) else needed or runs[:1]
    for name in sorted(damaged):
        _remove_part(files, work, name)
    _remove_files(work, {d.file for d in damages if d.part is None}, card=bool(commands))
    if not commands:
        raise ValueError(
            f"{work / encode.COMMANDS} does not say how this data set was made; {len(damaged)} damaged parts were taken "
            "out: run encode.py on it again by hand, which makes what is missing"
        )
    for command, arguments in runs:
        print(f"cd {shlex.quote(command.directory)} && python data_prep/encode.py {shlex.join(arguments)}", flush=True)
        with command.place():
            if encode.main(arguments):
                raise ValueError("encode.py did not come to its end: see above, and run this again")


def _needed(runs: list[Run], work: Path, damaged: set[str], files: set[str]) -> list[Run]:
    """The commands that make the damaged parts. Raises ValueError where the tar of one is gone, or is another one now."""
    needed: list[Run] = []
    found: set[str] = set()
    changed: list[str] = []
    for command, arguments in runs:
        with command.place(), contextlib.suppress(FileNotFoundError):
            jobs = [
                j for s in encode.sources_of(encode.parse(arguments)) for j in s.jobs() if j.name in damaged - found
            ]
            for job in jobs:
                believed = f"{shards.REPORTS}/{job.name}.json" not in files
                report = read_part_report(work, job.name) if believed else None
                if report is not None and report["tar_bytes"] != job.bytes:
                    changed.append(f"{job.url} has {job.bytes} bytes, {job.name} was made of {report['tar_bytes']}")
            needed += [(command, arguments)] if jobs else []
            found |= {job.name for job in jobs}
    if gone := sorted(damaged - found):
        changed.append(f"no tar is found any more for {', '.join(gone)}")
    if changed:
        raise ValueError("nothing was removed, as it cannot be made again: " + "; ".join(changed))
    return needed


def _remove_part(files: Files, work: Path, name: str) -> None:
    source, of = name.split("/")
    if files.remote is not None:
        there = [n.split("/") for n in files.sizes]
        folders = {f"{source}/{n[1]}/{of}" for n in there if len(n) == 4 and (n[0], n[2]) == (source, of)}
        for place in (f"{shards.REPORTS}/{name}.json", f"{shards.REPORTS}/{name}.jsonl", *sorted(folders)):
            files.remote.remove(place)
    remove_part(work, name)


def _remove_files(work: Path, damaged: set[str], card: bool) -> None:
    """Those that encode.py writes only where they are not there; a card stays if its settings can be read."""
    if shards.NULL_TEXT in damaged:
        (work / shards.NULL_TEXT).unlink(missing_ok=True)
    try:
        shards.Card.load(work)
    except FileNotFoundError:
        pass
    except ValueError:
        if card:
            (work / shards.CARD).unlink()
