"""Survey of a source: what its first samples have, said before anything is encoded, with the mend where captions lack."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_prep.common.words import counted
from data_prep.inputs.contents import Contents
from data_prep.inputs.filters import ALIASES, SIZES
from data_prep.inputs.folders import PictureFolder
from data_prep.inputs.reader import read_samples
from data_prep.inputs.samples import Sample
from data_prep.inputs.sources import Job, Source
from data_prep.inputs.tars import SORTED

SAMPLES = 100  # that are looked at


@dataclass(frozen=True)
class Survey:
    """What the first samples of a source have, in one line, and lines of what will go wrong."""

    line: str
    warnings: list[str]


def survey(source: Source, job: Job) -> Survey:
    """Reads the first samples of an input. Raises OSError where it cannot be read."""
    contents = Contents()
    items = list(islice(read_samples(job, contents, hold=False), SAMPLES))
    found = [item for item in items if isinstance(item, Sample)]
    have = _names(contents.members, contents.samples) + _names(contents.fields, contents.samples)
    where = f"{source.name}: the first {counted(contents.samples, 'sample')} of {job.url}"
    captions = ", ".join(sorted({item.caption_field for item in found})) or "nowhere"
    line = f"{where} have {', '.join(have[:20]) or 'nothing'}; captions come from {captions}"
    reasons = {item.reason for item in items if not isinstance(item, Sample)}
    warnings = []
    if not contents.samples:
        return Survey(line, [])
    if reasons & {"unsorted_tar", "members_apart"}:
        warnings.append(f"{where} have members that lie apart; {SORTED}")
    elif not found and not reasons - {"no_caption", "no_image"}:
        warnings.append(f"{where}: none has a picture with its caption{_proposal(contents)}{_mend(job, contents)}")
    warnings += absent_captions(source, contents, where)
    return Survey(line, warnings + absent_fields(source, contents, where))


def _mend(job: Job, contents: Contents) -> str:
    """Says what may be the matter where no picture has a caption."""
    if lists := PictureFolder(Path(job.url)).unread_lists() if job.files else []:
        return f"; {lists[0]} is not read: call it metadata{Path(lists[0]).suffix}, with a column file_name"
    if not 1 < contents.samples == contents.members.total():
        return ""
    # Members that stand alone: the others of their keys may lie elsewhere.
    if job.files:
        return "; captions must lie beside their pictures, cat.txt and cat.jpg in one folder"
    return f"; if captions come later in the tar: {SORTED}"


def absent_captions(source: Source, contents: Contents, where: str) -> list[str]:
    """Returns a warning where none of the samples has a caption that `--captions` names."""
    absent = [
        name for name, _ in source.captions.shares if not (contents.members[name.lower()] or contents.fields[name])
    ]
    return (
        [f"{where}: none has {' or '.join(map(repr, absent))}, which --captions names{_proposal(contents)}"]
        if absent
        else []
    )


def absent_fields(source: Source, contents: Contents, where: str) -> list[str]:
    """Returns a warning where none of the samples has a field that the filter reads."""
    names = dict.fromkeys(name for condition in source.filter.conditions for name in condition.names)
    absent = [n for n in names if n not in SIZES and not any(contents.fields[m] for m in (n, *ALIASES.get(n, ())))]
    there = f"; they have {', '.join(map(repr, list(contents.fields)[:20])) or 'no fields'}"
    return [f"{where}: none has {' or '.join(map(repr, absent))}, which the filter reads{there}"] if absent else []


def _proposal(contents: Contents) -> str:
    names = contents.proposals()[:4]
    return f"; what may be one: --captions {' or '.join(names)}" if names else ""


def _names(counts: dict[str, int], samples: int) -> list[str]:
    return [name if count == samples else f"{name} ({count})" for name, count in counts.items()]


def survey_sources(
    sources: Iterable[Source], jobs: Iterable[Job], say: Callable[[str], None], warn: Callable[[str], None]
) -> None:
    """Surveys the first input of each source. One that cannot be read for now is left to the encoding, which says so."""
    first = {job.source.name: job for job in reversed(list(jobs))}
    for source in sources:
        if source.name not in first:
            continue
        try:
            result = survey(source, first[source.name])
        except OSError:
            continue
        say(result.line)
        for warning in result.warnings:
            warn(f"warning: {warning}")
