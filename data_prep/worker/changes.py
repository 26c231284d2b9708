"""Changes since parts were made: inputs that were replaced, and data sets in which nothing was written.

A part's report keeps size and last change of its input. A part of an input that is another one now is removed and made again only
if that is asked for (`--changed remake`).
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.common.storage import Remote
from data_prep.inputs.sources import Job
from data_prep.schema import CARD, NULL_TEXT, REPORTS, WORK, Card
from data_prep.worker.claims import Claims, claim_path, claimed_names, owner_is_gone, read_claim, this_process
from data_prep.worker.parts import part_reports, read_part_report, remove_part


def changed_parts(root: Path, jobs: Sequence[Job]) -> dict[str, str]:
    """Returns the parts that were made of another input than there is now, each with what differs.

    Parts of pictures that are in other parts of their folder now count, too.
    """
    found = {}
    folders = {(job.source.name, job.url): {j.name for j in jobs if j.url == job.url} for job in jobs if job.files}
    by_name = {job.name: job for job in jobs}
    for name, report in part_reports(root):
        job, url = by_name.get(name), str(report.get("tar"))
        if job is not None and (difference := difference_of(job, report)):
            found[name] = difference
        elif job is None and name not in folders.get((name.split("/")[0], url), {name}):
            found[name] = f"{url} has fewer pictures than when {name} was made"
    return found


def difference_of(job: Job, report: dict[str, Any]) -> str | None:
    """Returns how an input differs from the one that a part's report names; None where it does not."""
    if report["tar_bytes"] != job.bytes:
        return f"{job.url} has {job.bytes} bytes, {job.name} was made of {report['tar_bytes']}"
    before = report.get("tar_changed")
    if before and job.changed and before != job.changed:
        return f"{job.url} was changed ({job.changed}) since {job.name} was made of it ({before})"
    return None


def remove_changed(
    root: Path, jobs: Sequence[Job], names: Iterable[str], claims: Claims, remote: Remote | None
) -> None:
    """Removes parts that were made of other inputs, so that they are made again, unless another worker makes them now."""
    by_name = {job.name: job for job in jobs}
    _mark_unfinished(root, remote)
    for name in names:
        if not claims.claim(name):
            continue
        report, job = read_part_report(root, name), by_name.get(name)
        if report is not None and (job is None or difference_of(job, report)):  # else another worker has made it
            remove_part_everywhere(root, name, report, remote)
            for hashes in (root / WORK / "hashes").glob(f"*/{glob.escape(name)}.npz"):
                hashes.unlink()
        claims.release(name)


def remove_part_everywhere(root: Path, name: str, report: dict[str, Any], remote: Remote | None) -> None:
    """Removes a part from the data set's folder, and from object storage where its shards are there."""
    source, part = name.split("/")
    if remote is not None:
        for target in (f"{REPORTS}/{name}.json", f"{REPORTS}/{name}.jsonl"):
            remote.remove(target)
        for set_ in report["sets"]:
            remote.remove(f"{source}/{set_}/{part}")
    remove_part(root, name)


def start_anew(root: Path, remote: Remote | None) -> None:
    """Removes a data set in which nothing was written, so that it can be made with other settings."""
    for name, report in list(part_reports(root)):
        assert not sum(report["written"].values())
        remove_part_everywhere(root, name, report, remote)
    for name in (NULL_TEXT, CARD):
        (root / name).unlink(missing_ok=True)
        if remote is not None:
            remote.remove(name)


def is_empty(root: Path) -> bool:
    """Returns whether a data set holds no sample, and no living worker may be about to write one."""
    if any(sum(report["written"].values()) for _, report in part_reports(root)):
        return False
    folder = root / WORK / "claims"
    here, contents = this_process(), []
    if folder.is_dir():
        contents = [read_claim(claim_path(folder, name)) for name in claimed_names(folder)]
    return all(content is None or owner_is_gone(content, here) for content in contents)


def _mark_unfinished(root: Path, remote: Remote | None) -> None:
    card = Card.load(root)
    if card.complete:
        replace(card, complete=False).save(root)
        if remote is not None:
            remote.upload(root / CARD, CARD)
