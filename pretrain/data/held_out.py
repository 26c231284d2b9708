"""Samples that are held out of training for validation: those of a source, or those of tars that a hash of their names chooses.

A tar is one part of each set, with shards of its own. So names alone decide, and no sample is read for it; the choice is the same
for any number of processes, order and resolution, and for the same tars encoded again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from data_prep import schema
from data_prep.common.words import counted
from pretrain.config import DataSection
from pretrain.data.shard_index import ShardIndex


@dataclass(frozen=True)
class ShardName:
    """A shard of a data set: its set, `SOURCE/RESOLUTIONS`, and its file within the set's folder, `TAR/FILE`."""

    set_: str
    file: str

    @property
    def tar(self) -> str:
        """The tar that it was made of, as `SOURCE/TAR`."""
        return f"{self.set_.partition('/')[0]}/{self.file.rpartition('/')[0]}"

    @property
    def hash(self) -> float:
        """A number in 0..1 that follows from the name."""
        return hash_of(f"{self.set_}/{self.file}")


@cache
def hash_of(name: str) -> float:
    """A number in 0..1 that follows from a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big") / 2**56


def is_trained_on(shard: ShardName, validation: float | str | None) -> bool:
    """Whether a shard is for training, by `data.validation`; else it is held out."""
    if isinstance(validation, str):
        return shard.set_.partition("/")[0] != validation
    return validation is None or hash_of(shard.tar) >= validation


def sets_read(card: schema.Card, data: DataSection) -> list[str]:
    """The sets of the resolution that training or validation may read, in order.

    Raises:
        ValueError: `data.validation` names a source that has none.
    """
    sets = card.sets_with(data.resolution)
    known = {about["source"] for about in sets.values()}
    if isinstance(data.validation, str) and data.validation not in known:
        raise ValueError(
            f"data.validation: {data.path} has no source {data.validation} with samples for {data.resolution} px; "
            f"its sources that have some: {', '.join(sorted(known))}"
        )
    read = known if data.sources is None else {*data.sources, data.validation}
    return sorted(name for name, about in sets.items() if about["source"] in read)


def held_out_shards(indexes: Mapping[str, ShardIndex], data: DataSection) -> dict[ShardName, int]:
    """The held-out shards with their samples, in a fixed order that mixes tars, sets and sources.

    Args:
        indexes: the sets of `sets_read`, by their folders within the data set.

    Raises:
        ValueError: they have fewer samples than validation asks for.
    """
    if data.validation is None:
        return {}
    found = {shard: samples for shard, samples in _shards(indexes) if not is_trained_on(shard, data.validation)}
    if sum(found.values()) < data.validation_samples:
        raise ValueError(_too_few(found, dict(_shards(indexes)), data))
    return {shard: found[shard] for shard in sorted(found, key=lambda shard: (shard.hash, shard.set_, shard.file))}


def _shards(indexes: Mapping[str, ShardIndex]) -> Iterator[tuple[ShardName, int]]:
    """Each shard with its number of samples."""
    for name, index in indexes.items():
        for file, samples in zip(index.file_names(), index.samples.tolist(), strict=True):
            yield ShardName(name, file), samples


def select(indexes: Mapping[str, ShardIndex], keep: Callable[[ShardName], bool]) -> dict[str, ShardIndex]:
    """The shards of each set for which `keep` is true."""
    return {
        name: index.select([keep(ShardName(name, file)) for file in index.file_names()])
        for name, index in indexes.items()
    }


def _too_few(found: dict[ShardName, int], shards: dict[ShardName, int], data: DataSection) -> str:
    there = f"{counted(sum(found.values()), 'sample')} for {data.resolution} px"
    asked = f"data.validation_samples asks for {data.validation_samples}"
    if isinstance(data.validation, str):
        return f"data.validation: {data.validation} has {there}, {asked}; lower it"
    tars, enough = len({shard.tar for shard in found}), _smallest_share(shards, data.validation_samples)
    mend = "lower that" if enough is None else f"from a share of {enough:g} on there are enough, or lower that"
    return (
        f"data.validation: of the tars of {data.path} {data.validation:g} are {counted(tars, 'tar')} by their names, with "
        f"{there}; {asked}: {mend}"
    )


def _smallest_share(shards: dict[ShardName, int], samples: int) -> float | None:
    """The smallest share, in ten-thousandths, that holds out so many samples; None where no share below 1 does."""
    there = 0
    for shard in sorted(shards, key=lambda shard: hash_of(shard.tar)):
        there += shards[shard]
        share = math.floor(hash_of(shard.tar) * 10_000 + 1) / 10_000
        if there >= samples and share < 1:
            return share
    return None


def samples_by_set(shards: Mapping[ShardName, int]) -> dict[str, int]:
    """The number of samples of these shards in each set that has some."""
    counts: dict[str, int] = {}
    for shard, samples in shards.items():
        counts[shard.set_] = counts.get(shard.set_, 0) + samples
    return counts


def was_trained_on(here: DataSection, there: Mapping[str, Any]) -> bool:
    """Whether a run whose `data` settings were `there` trained on samples of the same data set that are held out here."""
    before = there.get("validation")
    if here.validation is None or there["path"] != here.path:
        return False
    if isinstance(here.validation, float):
        return not isinstance(before, float) or before < here.validation
    sources = there.get("sources")
    return before != here.validation and (sources is None or here.validation in sources)
