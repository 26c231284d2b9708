"""Deduplication before the encoding: finds pictures that repeat an earlier one, across all tars of all sources.

    work/hashes/…/SOURCE/PART.npz     keys and hashes of a tar's pictures; made in any order, by any worker
    work/repeats/…/SOURCE/PART.json   pictures of a tar that repeat an earlier one: key → source/part/key of the earlier one
    work/repeats/…/done               written last, by the worker that compared all hashes

Of several copies the first one is kept, in the order of sources, tars and samples; so it does not matter which tar was read
first. Samples that are dropped anyway (filtered, without a caption, too small, broken) are left out of the comparison: a copy of
one of them that can be written is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.common.files import atomic_write
from data_prep.inputs.filters import add_sizes
from data_prep.inputs.reader import read_samples
from data_prep.inputs.samples import Sample
from data_prep.inputs.sources import Job
from data_prep.pictures.decoders import DecoderPool
from data_prep.pictures.hashes import hash_picture, repeats
from data_prep.pictures.images import Unusable
from data_prep.schema import WORK
from data_prep.worker.claims import Claims

AHEAD = 256  # pictures that are being hashed at once


@dataclass(frozen=True)
class DuplicateSearch:
    """Settings of the search. `method`: exact | perceptual; `distance`: bits of 64 that may differ; sizes in pixels."""

    method: str
    distance: int
    resolutions: tuple[int, ...]
    buckets: bool

    @property
    def folder(self) -> str:
        """Name of the folder for hashes and repeats of these settings."""
        sizes = "-".join(map(str, self.resolutions)) + ("b" if self.buckets else "")
        return f"{self.method}-{self.distance}-{sizes}" if self.method == "perceptual" else f"{self.method}-{sizes}"


def find_repeats(
    root: Path, jobs: list[Job], search: DuplicateSearch, claims: Claims, pool: DecoderPool, say: Callable[[str], None]
) -> Callable[[Job], dict[str, str]]:
    """Hashes and compares all pictures, together with the other workers; returns a function from a job to its repeats.

    The repeats of a tar are the keys of its pictures that repeat an earlier one, each with the earlier one's name.
    `say` prints a line.

    Raises:
        OSError: a tar cannot be read; what repeats its pictures is not known then.
    """
    hashes, found = (root / WORK / name / search.folder for name in ("hashes", "repeats"))
    by_name = {job.name: job for job in jobs}
    stamp = json.dumps([[job.name, job.bytes, job.changed] for job in jobs])
    done = found / "done"

    def hashed() -> set[str]:
        return {p.relative_to(hashes).with_suffix("").as_posix() for p in hashes.glob("*/*.npz")}

    for count, name in enumerate(claims.take(list(by_name), hashed, "hashes of ", wait=True)):
        _hash_tar(by_name[name], hashes / f"{name}.npz", search, pool)
        if count == 0:
            say("looking for duplicates: every picture is read once before it is encoded")

    def compared() -> set[str]:
        return {"all"} if done.is_file() and done.read_text() == stamp else set()

    for _ in claims.take(["all"], compared, "repeats of ", wait=True):
        dropped = _compare(jobs, hashes, found, search)
        atomic_write(done, stamp)
        say(f"{dropped} pictures repeat an earlier one ({search.method})")
    return lambda job: json.loads((found / f"{job.name}.json").read_text(encoding="utf-8"))


def _hash_tar(job: Job, path: Path, search: DuplicateSearch, pool: DecoderPool) -> None:
    """Writes keys and hashes of a tar's pictures, but for those that are dropped for another reason."""
    keys, values = [], []
    for key, value in _hashes_of(job, search, pool):
        keys.append(key)
        values.append(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, keys=np.array(keys, dtype=np.str_), hashes=np.array(values, dtype=np.uint64))
    temporary.replace(path)


def _hashes_of(job: Job, search: DuplicateSearch, pool: DecoderPool) -> Iterator[tuple[str, int]]:
    before, after = job.source.filter.before, job.source.filter.after
    submit = partial(pool.submit, hash_picture)

    def submitted() -> Iterator[tuple[Sample, Future]]:
        for sample in read_samples(job):
            if isinstance(sample, Sample) and not before.refusal(sample.metadata):
                yield sample, submit(sample.image, search.method, search.resolutions, search.buckets)

    waiting = submitted()
    ahead = list(islice(waiting, AHEAD))
    while ahead:
        sample, future = ahead.pop(0)
        ahead += islice(waiting, 1)
        try:
            picture = future.result()
        except Unusable:
            continue
        if not after.refusal(add_sizes(sample.metadata, picture.width, picture.height)):
            yield sample.key, picture.hash


def _compare(jobs: list[Job], hashes: Path, found: Path, search: DuplicateSearch) -> int:
    """Compares all hashes and writes each tar's repeats; returns their number."""
    arrays = []
    for job in jobs:
        with np.load(hashes / f"{job.name}.npz", allow_pickle=False) as file:
            arrays.append(file["hashes"])
    starts = np.concatenate([[0], np.cumsum([len(a) for a in arrays])])
    distance = search.distance if search.method == "perceptual" else 0
    first = repeats(np.concatenate([*arrays, np.empty(0, np.uint64)]), distance)
    # Keys are read only of tars with a repeat or with the original of one.
    keys: dict[int, np.ndarray] = {}

    def key(index: int) -> tuple[Job, str]:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        if part not in keys:
            with np.load(hashes / f"{jobs[part].name}.npz", allow_pickle=False) as file:
                keys[part] = file["keys"]
        return jobs[part], str(keys[part][index - starts[part]])

    total = 0
    for number, job in enumerate(jobs):
        repeated = np.flatnonzero(first[starts[number] : starts[number + 1]] >= 0) + starts[number]
        originals = {key(int(i))[1]: key(int(first[i])) for i in repeated}
        total += len(originals)
        path = found / f"{job.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps({k: f"{j.name}/{original}" for k, (j, original) in originals.items()}))
    return total
