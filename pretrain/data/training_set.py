"""The samples of one resolution in their reproducible order, each with a seed of its own.

A sample's seed follows from the run's seed, the epoch, the sample's key, and how often it was drawn in this epoch before; all
its random numbers come from it. A sample that cannot be read is replaced by another one of its set, so that all others stay
in their places; the sample in its place tells of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

from data_prep import schema
from pretrain.config import Config
from pretrain.data.batch import Sample
from pretrain.data.epoch_plan import EpochPlan
from pretrain.data.shard_reader import SetStream, UnreadableSample
from pretrain.data.streaming_private import PositionedDataset

# Samples of a shard that are taken or left together where a set is drawn in part: fewer shards are fetched for them.
GRANULE = 64
# Samples that are tried in the place of one that cannot be read.
ATTEMPTS = 32


class TrainingSet(PositionedDataset):
    """The samples of one resolution, for one process. Call `start_at` before each pass.

    Args:
        streams: the sets, with the samples that an epoch draws of each.
        card: the data set's; `sources` are the names of the streams' sources, in the order of their numbers.
        process_batch: samples of an optimizer step in this process.
        plan: what each epoch draws of the streams.
    """

    def __init__(
        self, streams: list[SetStream], config: Config, card: schema.Card, process_batch: int, plan: EpochPlan
    ):
        super().__init__(
            streams,
            plan.parts if plan.scheduled else None,
            batch_size=process_batch,
            shuffle=True,
            shuffle_algo="py1e",
            shuffle_seed=config.seed,
            shuffle_block_size=config.data.shuffle_block,
            num_canonical_nodes=config.data.canonical_nodes,
            sampling_granularity=GRANULE,
            batching_method="per_stream" if card.buckets else "random",
            cache_limit=config.data.cache_limit,
            allow_unsafe_types=False,
        )
        self.text_dtype = card.text_dtype
        self.features_dtype = card.features["dtype"] if card.features and config.alignment.weight else None
        self.resolution = config.data.resolution
        self.set_names = [stream.name for stream in streams]
        source_of = [card.sets[name]["source"] for name in self.set_names]
        self.sources = sorted(set(source_of))
        self._source_numbers = [self.sources.index(source) for source in source_of]

    def start_at(self, epoch: int, first_sample: int, seed: int) -> None:
        """Sets where the next pass starts, and the seed of its order and of its samples' random numbers."""
        self.epoch, self.first_sample = epoch, first_sample
        self.shuffle_seed = seed

    def __getitem__(self, at: Any) -> Any:
        repeat, number = divmod(int(at), self.num_samples)
        row, damaged = self._readable(number)
        seed = sample_seed(self.shuffle_seed, self.epoch, f"{row['key']}/{repeat}" if repeat else row["key"])
        text, latent = schema.text_of(row, self.text_dtype), schema.latent_of(row, self.resolution)
        source = self._source_numbers[self.place_of(number).stream]
        features = self.features_dtype and schema.features_of(row, self.resolution, self.features_dtype)
        return Sample(row["key"], seed, text, latent, source, damaged, features)

    def _readable(self, number: int) -> tuple[dict[str, Any], tuple[UnreadableSample, ...]]:
        """Reads the row of a sample or, where it cannot be read, of another one of its set.

        Returns:
            The row, and the samples that could not be read before it.

        Raises:
            ValueError: none of ATTEMPTS others can be read.
        """
        damaged: list[UnreadableSample] = []
        for other in chain([number], self._substitutes(number)):
            try:
                return self.get_item(other), tuple(damaged)
            except (OSError, ValueError) as error:
                place = self.place_of(other)
                name = f"{self.set_names[place.stream]}/{self.shards[place.shard].stored_name}"
                damaged.append(UnreadableSample(name, place.index, str(error)))
        first = damaged[0]
        raise ValueError(
            f"{first.shard}: sample {first.sample} cannot be read ({first.reason}), nor can any of {ATTEMPTS} others of its "
            "set; run data_prep/verify.py --repair on the data set"
        )

    def _substitutes(self, number: int) -> Iterator[int]:
        """Numbers of ATTEMPTS samples of the same set to stand in for one, the same for any number of processes.

        For the samples of one shard they come from one other shard, if that can be read: few are fetched for them.
        """
        place = self.place_of(number)
        shards_of_set = self.shards_of(place.stream)
        start = sample_seed(self.shuffle_seed, self.epoch, f"in place of shard {place.shard}")
        for attempt in range(1, ATTEMPTS + 1):
            shard = shards_of_set[(start + attempt) % len(shards_of_set)]
            yield self.number_of(shard, place.index + attempt)


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """The seed (56 bits) of all random numbers of one sample in one epoch."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=7).digest(), "big")
