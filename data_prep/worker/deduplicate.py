"""The pass before the encoding that finds pictures which are there twice, across all tars of all sources.

    work/hashes/…/SOURCE/PART.npz     keys and hashes of a tar's pictures; made in any order, by any worker
    work/repeats/…/SOURCE/PART.json   the pictures of a tar that an earlier one repeats: key → source/part/key of that one
    work/repeats/…/done               written last, by the worker that compared them all

Of several copies the first one stays, by the order of the sources, their tars, and the samples within; so it does not matter
which tar was read first. Samples that would not be written anyway (filtered, without a caption, too small, broken) take no part:
none of them can push out a copy that would.
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
from data_prep.inputs.filters import with_sizes
from data_prep.inputs.sources import Job
from data_prep.inputs.tars import Sample, read_tar
from data_prep.pictures.decoders import DecoderPool
from data_prep.pictures.hashes import look, repeats
from data_prep.pictures.images import Unusable
from data_prep.schema import WORK
from data_prep.worker.claims import Claims

AHEAD = 256  # samples that are read before their hashes are asked for
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Search:
    """How repeats are found. `method`: exact | perceptual; `distance`: bits of 64 that may differ."""

    method: str
    distance: int
    resolutions: tuple[int, ...]
    buckets: bool

    @property
    def folder(self) -> str:
        """Hashes hold for this method alone."""
        sizes = "-".join(map(str, self.resolutions)) + ("b" if self.buckets else "")
        return f"{self.method}-{self.distance}-{sizes}" if self.method == "perceptual" else f"{self.method}-{sizes}"


def find(
    root: Path, jobs: list[Job], search: Search, claims: Claims, pool: DecoderPool, say: Callable[[str], None]
) -> Callable[[Job], dict[str, str]]:
    """The repeats of each job's tar, once all workers together have found them.

    Raises:
        OSError: a tar cannot be read; without it nobody knows what repeats it.
    """
    hashes, found = (root / WORK / name / search.folder for name in ("hashes", "repeats"))
    by_name = {job.name: job for job in jobs}
    stamp = json.dumps([[job.name, job.bytes] for job in jobs])
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


def _hash_tar(job: Job, path: Path, search: Search, pool: DecoderPool) -> None:
    """Keys and hashes of the pictures of a tar that will be written if no other one is like them."""
    keys, values = [], []
    for key, value in _looked_at(job, search, pool):
        keys.append(key)
        values.append(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, keys=np.array(keys, dtype=np.str_), hashes=np.array(values, dtype=np.uint64))
    temporary.replace(path)


def _looked_at(job: Job, search: Search, pool: DecoderPool) -> Iterator[tuple[str, int]]:
    before, after = job.source.filter.before, job.source.filter.after
    submit = partial(pool.submit, look)

    def submitted() -> Iterator[tuple[Sample, Future]]:
        for sample in read_tar(job.url, job.source.captions):
            if isinstance(sample, Sample) and not before.refusal(sample.metadata):
                yield sample, submit(sample.image, search.method, search.resolutions, search.buckets)

    try:
        waiting = submitted()
        ahead = list(islice(waiting, AHEAD))
    except ValueError:  # no tar: told when it is encoded
        return
    while ahead:
        sample, future = ahead.pop(0)
        ahead += islice(waiting, 1)
        try:
            seen = future.result()
        except Unusable:
            continue
        if not after.refusal(with_sizes(sample.metadata, seen.width, seen.height)):
            yield sample.key, seen.hash


def _compare(jobs: list[Job], hashes: Path, found: Path, search: Search) -> int:
    """Writes each tar's repeats; returns how many there are."""
    arrays = []
    for job in jobs:
        with np.load(hashes / f"{job.name}.npz", allow_pickle=False) as file:
            arrays.append(file["hashes"])
    starts = np.concatenate([[0], np.cumsum([len(a) for a in arrays])])
    distance = search.distance if search.method == "perceptual" else 0
    first = repeats(np.concatenate([*arrays, np.empty(0, np.uint64)]), distance)
    # Keys are read only for the tars that lose pictures or keep those of others.
    needed: dict[int, np.ndarray] = {}

    def key(index: int) -> tuple[Job, str]:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        if part not in needed:
            with np.load(hashes / f"{jobs[part].name}.npz", allow_pickle=False) as file:
                needed[part] = file["keys"]
        return jobs[part], str(needed[part][index - starts[part]])

    total = 0
    for number, job in enumerate(jobs):
        lost = np.flatnonzero(first[starts[number] : starts[number + 1]] >= 0) + starts[number]
        originals = {key(int(i))[1]: key(int(first[i])) for i in lost}
        total += len(originals)
        path = found / f"{job.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps({k: f"{j.name}/{original}" for k, (j, original) in originals.items()}))
    return total
