"""What an epoch draws from which sets of a data set, and where their files are read.

plan        samples of each set in an epoch: all of them once, or a mixture of sources
DataLocation       a folder, or a URL or folder with a cache on this node's own disk
prepare     once per node: the indexes fetched, the cache rid of what is stale, missing and cut shards named
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from data_prep import schema as shards
from data_prep.common.files import temporary_name
from data_prep.common.storage import Remote, is_remote
from pretrain.config import DataSection

T = TypeVar("T")
CLAIM = "in-use"  # locked in the cache

# ---- what an epoch draws ----


@dataclass(frozen=True)
class Plan:
    """The samples that an epoch draws of each set, by its folder, in order; `notes` say what is uneven about it."""

    draws: dict[str, int]
    notes: tuple[str, ...] = field(default=(), compare=False)


def plan(card: shards.Card, data: DataSection, global_batch: int) -> Plan:
    """Divides an epoch among the sets that hold the resolution.

    Without `data.sources` every sample is drawn once. With them an epoch is as long as the named sources together, and
    each source's share of it is split over its sets by their samples; a source may so be drawn several times, or in part.
    With buckets a set gives whole global batches, for each is of one set and so of one shape: of what is left of a set,
    an epoch leaves out others than the one before. A set smaller than one global batch is not used.

    Raises:
        ValueError: an unknown source, or one without enough samples.
    """
    sets = dict(sorted(card.sets_with(data.resolution).items()))
    shares = _shares(sets, data)
    samples = {name: about["samples"] for name, about in sets.items() if about["source"] in shares}
    unit = global_batch if card.buckets else 1
    usable = {name: count for name, count in samples.items() if count >= unit}
    if sum(usable.values()) < global_batch:
        raise ValueError(_too_few(data, samples, global_batch, card.buckets))
    if data.sources is None:
        draws = {name: count // unit * unit for name, count in usable.items()}
    else:
        draws = {}
        parts = _split(sum(usable.values()) // unit, list(shares.values()))
        for source, part in zip(shares, parts, strict=True):
            of = {name: count for name, count in usable.items() if sets[name]["source"] == source}
            if not of or not part:
                raise ValueError(
                    f"data.sources: {source} cannot give one {'global batch of one shape' if unit > 1 else 'sample'} an "
                    f"epoch; raise its share, leave it out, or lower deepspeed.train_batch_size ({global_batch})"
                )
            counts = _split(part, list(of.values()))
            draws |= {name: count * unit for name, count in zip(of, counts, strict=True) if count}
    least = min(draws.values())
    if card.buckets and data.shuffle_block * least < sum(draws.values()):
        raise ValueError(f"data.shuffle_block: {data.shuffle_block} is too small for the set of {least} samples")
    return Plan(draws, (*_left_out(samples, draws, global_batch), *_mixture(sets, data, draws)))


def _shares(sets: dict[str, dict[str, Any]], data: DataSection) -> dict[str, float]:
    """The used sources' shares, by name in order; shares are all 1 without `data.sources`."""
    known = sorted({about["source"] for about in sets.values()})
    if data.sources is None:
        return dict.fromkeys(known, 1.0)
    if unknown := sorted(data.sources.keys() - set(known)):
        raise ValueError(
            f"data.sources: {data.path} has no {', '.join(unknown)} with samples for {data.resolution} px; "
            f"its sources that have some: {', '.join(known)}"
        )
    return dict(sorted(data.sources.items()))


def _split(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole numbers by these weights, the largest remainders rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def _too_few(data: DataSection, samples: dict[str, int], global_batch: int, buckets: bool) -> str:
    there = f"{data.path} has {sum(samples.values())} samples for {data.resolution} px"
    if not buckets:
        return f"{there}, less than one global batch of {global_batch}"
    return (
        f"{there}, but the largest of its {len(samples)} sets of one shape has {max(samples.values())}, less than one global "
        f"batch of {global_batch}; lower deepspeed.train_batch_size"
    )


def _left_out(samples: dict[str, int], draws: dict[str, int], global_batch: int) -> Iterable[str]:
    if missing := samples.keys() - draws.keys():
        count, total = sum(samples[name] for name in missing), sum(samples.values())
        yield (
            f"data: {len(missing)} of {len(samples)} sets cannot fill one global batch of {global_batch} and are left out: "
            f"{count} of {total} samples ({count / total:.2%})"
        )


def _mixture(sets: dict[str, dict[str, Any]], data: DataSection, draws: dict[str, int]) -> Iterable[str]:
    if data.sources is None:
        return
    total, words = sum(draws.values()), []
    for source in sorted(data.sources):
        count = sum(n for name, n in draws.items() if sets[name]["source"] == source)
        there = sum(about["samples"] for about in sets.values() if about["source"] == source)
        words.append(f"{count / total:.2%} {source} (each sample {count / there:.2f} times)")
    unused = sorted({about["source"] for about in sets.values()} - data.sources.keys())
    nothing = f"; nothing of {', '.join(unused)}, which data.sources does not name" if unused else ""
    yield f"data: an epoch of {total} samples is {', '.join(words)}{nothing}"


# ---- where it is read ----


@dataclass(frozen=True)
class DataLocation:
    """Where a data set is read.

    Attributes:
        origin: the data set's folder or URL.
        root: the folder with its small files: the data set itself, or its own folder in the cache.
        cached: whether shards are copied or decompressed into `root` before they are read.
    """

    origin: str
    root: Path
    cached: bool

    @classmethod
    def of(cls, data: DataSection) -> DataLocation:
        """As the config says. Each data set has its own folder in the cache, named after where it comes from."""
        remote = is_remote(data.path)
        origin = data.path.rstrip("/") if remote else str(Path(data.path).resolve())
        if data.cache is None:
            return cls(origin, Path(data.path), cached=False)
        if remote and "S3_ENDPOINT_URL" in os.environ:  # which streaming reads, but not the library that lists here
            os.environ.setdefault("AWS_ENDPOINT_URL", os.environ["S3_ENDPOINT_URL"])
        digest = hashlib.sha256(origin.encode()).hexdigest()[:8]
        return cls(origin, data.cache / f"{origin.rpartition('/')[2]}-{digest}", cached=True)

    def claim(self) -> IO[str] | None:
        """Keeps other trainings out of the cache while the returned file is open. Raises ValueError where one is in it."""
        if not self.cached:
            return None
        self.root.mkdir(parents=True, exist_ok=True)
        file = (self.root / CLAIM).open("w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"data.cache: {self.root} is in use by another training on this node; give this one another folder"
            ) from error
        return file

    def fetch(self, name: str) -> Path:
        """Fetches a small file of the data set, and returns its path: beside its place in the cache, to be renamed."""
        place = self.root / name
        new = place.with_name(temporary_name(place.name))
        if not Remote(self.origin).download(name, new):
            raise FileNotFoundError(
                f"{self.origin} is no data set: {name} is missing; make one with data_prep/encode.py"
            )
        return new


def open_card(place: DataLocation, world: int) -> shards.Card:
    """The data set's card; with a cache it and the null text are fetched first, once per node."""

    def fetch() -> None:
        for name in (shards.CARD, shards.NULL_TEXT):
            place.fetch(name).replace(place.root / name)

    if place.cached:
        once_per_node(fetch, world)
    card = shards.Card.load(place.root)
    if card.choices.get("compression") and not place.cached:
        raise ValueError(
            f"data.cache: the shards of {place.origin} are compressed; give a folder on each node's own disk to unpack them in"
        )
    return card


def prepare(place: DataLocation, sets: Iterable[str], budget: int, world: int) -> list[str]:
    """Makes the sets ready to be read: once per node, the other processes wait.

    Returns: in the first process of a node what is missing, one line each; `budget` is how many shards that may be.

    Raises:
        ValueError: on all processes: more are missing or cut, or the cache is in use.
    """

    def action() -> list[str]:
        for name in sets:
            if place.cached:
                _refresh(place, name)
        return check_shards(place, sets, budget)

    return once_per_node(action, world) or []


def _refresh(place: DataLocation, name: str) -> None:
    """Fetches a set's index. Shards in the cache that are of an earlier one, or were cut off, are removed before."""
    path = place.root / name / shards.INDEX
    new = place.fetch(f"{name}/{shards.INDEX}")
    before = _files(path) if path.is_file() else {}
    now = _files(new)
    for basename in before.keys() | now.keys():
        shard, about = path.parent / basename, now.get(basename)
        good = about is not None and before.get(basename) == about and _size(shard) == about["bytes"]
        if not good:
            shard.unlink(missing_ok=True)
    new.replace(path)


def _files(index: Path) -> dict[str, dict[str, Any]]:
    """Every file that an index names, with its bytes and hashes: the shards as they are read, and as they are stored."""
    return {about["basename"]: about for shard in _shards(index) for about in shard if about is not None}


def _shards(index: Path) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each shard's raw and, if compressed, stored file. Raises ValueError for an index that is damaged or reaches out."""
    try:
        found = [(shard["raw_data"], shard["zip_data"]) for shard in json.loads(index.read_text())["shards"]]
        names = [Path(about["basename"]) for pair in found for about in pair if about is not None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged ({error!r}); encode the data set again") from error
    if any(name.is_absolute() or ".." in name.parts for name in names):
        raise ValueError(f"{index} names files outside of its folder: it was not made by data_prep/encode.py")
    return found


def check_shards(place: DataLocation, sets: Iterable[str], budget: int) -> list[str]:
    """A line for each shard that is missing or cut. Raises ValueError where those are more than the budget."""
    bad = []
    for name in sets:
        wanted = [stored or raw for raw, stored in _shards(place.root / name / shards.INDEX)]
        sizes = _sizes(place.origin, name, [about["basename"] for about in wanted])
        bad += [
            f"{place.origin}/{name}/{about['basename']}: "
            f"{'missing' if size is None else f'{size} bytes'}, expected {about['bytes']} bytes"
            for about in wanted
            if (size := sizes.get(about["basename"])) != about["bytes"]
        ]
    if len(bad) > budget:
        lines = "".join(f"\n  {line}" for line in bad[:10])
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(
            f"{place.origin}: {len(bad)} shards are missing or cut, data.damaged_shards allows {budget}; "
            f"data_prep/verify.py --repair makes them again:{lines}{more}"
        )
    return [f"data: {line}; other samples stand in for its own" for line in bad]


def _sizes(origin: str, name: str, basenames: list[str]) -> dict[str, int]:
    """The bytes of those of a set's files that are there."""
    if is_remote(origin):
        return {path.removeprefix(f"{name}/"): size for path, size in Remote(origin).sizes(name).items()}
    sizes = {basename: _size(Path(origin, name, basename)) for basename in basenames}
    return {basename: size for basename, size in sizes.items() if size is not None}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def once_per_node(action: Callable[[], T], world: int) -> T | None:
    """What the action gives in the first process of each node; all go on after it, or raise what it raised on any node."""
    result, problem = None, None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            result = action()
        except (ValueError, OSError) as error:
            if world == 1:
                raise
            problem = str(error)
    if world > 1:
        problems: list[Any] = [None] * world
        torch.distributed.all_gather_object(problems, problem)
        if found := [p for p in problems if p]:
            raise ValueError(found[0])
    return result
