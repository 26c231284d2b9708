"""The held-out samples that validation uses: each at one noise level with noise of its own, in batches that never change.

Sample k in the fixed order of `held_out_shards` has the noise level (k mod 8) / 8. A batch holds samples of one noise level and
one shape; which ones does not depend on the number of processes, among which the batches are dealt out. They are read when
training starts, and kept in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from data_prep import schema
from pretrain.config import VALIDATION_LEVELS, DataSection
from pretrain.data.batch import Batch, Collate, Sample
from pretrain.data.held_out import ShardName, select
from pretrain.data.location import DataLocation
from pretrain.data.shard_index import ShardIndex
from pretrain.data.shard_reader import SetStream
from pretrain.data.streaming_private import ShardFile
from pretrain.data.training_set import sample_seed
from pretrain.distributed.world import World, all_gather, once_per_node

SEED, EPOCH = 0, 0  # of the samples' random numbers, whatever the run's seed


@dataclass(frozen=True)
class ValidationBatch:
    """Held-out samples of one shape; `numbers` are their places in the fixed order, `t` is the noise level of all of them."""

    numbers: tuple[int, ...]
    t: float
    batch: Batch


@dataclass(frozen=True)
class _Place:
    """The place of a sample in the fixed order, and in its shard."""

    number: int
    shard: ShardName
    index: int


def read_validation_batches(
    location: DataLocation,
    card: schema.Card,
    data: DataSection,
    indexes: Mapping[str, ShardIndex],
    shards: Mapping[ShardName, int],
    collate: Collate,
    world: World,
) -> list[ValidationBatch]:
    """Reads this process's batches. All processes call it.

    Args:
        indexes: the sets, by their folders within the data set.
        shards: the held-out shards with their samples, in order.
        collate: the training's; captions are never dropped here.

    Raises:
        ValueError: on all processes: a sample cannot be read.
    """
    places = list(islice(_places(shards), data.validation_samples))
    needed = {place.shard for place in places}
    if location.cached:
        once_per_node(lambda: _open(location, indexes, needed), world)
    mine = _planned(places, card, collate.micro)[world.rank :: world.size]
    batches, problem = [], None
    try:
        files = _open(location, indexes, {place.shard for group in mine for place in group})
        for group in mine:
            samples = [_read(files[place.shard], place, card, data) for place in group]
            (batch,) = replace(collate, dropout=0.0)(samples)
            batches.append(ValidationBatch(tuple(p.number for p in group), _level(group[0]), batch))
    except ValueError as error:
        problem = str(error)
    if problems := [p for p in all_gather(problem, world) if p]:
        raise ValueError(problems[0])
    return batches


def _places(shards: Mapping[ShardName, int]) -> Iterator[_Place]:
    numbers = iter(range(sum(shards.values())))
    for shard, samples in shards.items():
        for index in range(samples):
            yield _Place(next(numbers), shard, index)


def _level(place: _Place) -> float:
    return place.number % VALIDATION_LEVELS / VALIDATION_LEVELS


def _planned(places: list[_Place], card: schema.Card, micro: int) -> list[list[_Place]]:
    """The batches of all processes, of at most `micro` samples each."""
    alike: dict[tuple[float, str], list[_Place]] = {}
    for place in places:
        alike.setdefault((_level(place), str(card.sets[place.shard.set_]["bucket"])), []).append(place)
    return [group[i : i + micro] for group in alike.values() for i in range(0, len(group), micro)]


def _open(
    location: DataLocation, indexes: Mapping[str, ShardIndex], shards: set[ShardName]
) -> dict[ShardName, ShardFile]:
    files: dict[ShardName, ShardFile] = {}
    sets = {name: indexes[name] for name in sorted({shard.set_ for shard in shards})}
    for name, index in select(sets, shards.__contains__).items():
        files |= SetStream(location, name, index, choose=1).open()
    return files


def _read(file: ShardFile, place: _Place, card: schema.Card, data: DataSection) -> Sample:
    """Reads a sample; its random numbers follow from its key alone. Raises ValueError where it cannot be read."""
    try:
        row = file[place.index]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.validation: {place.shard.set_}/{file.stored_name}: sample {place.index} cannot be read ({error}), and no "
            "other stands in for a held-out one; run data_prep/verify.py --repair on the data set"
        ) from error
    text, latent = schema.text_of(row, card.text_dtype), schema.latent_of(row, data.resolution)
    return Sample(row["key"], sample_seed(SEED, EPOCH, row["key"]), text, latent)
