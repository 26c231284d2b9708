"""The training data, one optimizer step after the other: the data set checked, the order reproducible, the position exact.

One item of the loader is everything that a process needs for one optimizer step, as a list of micro-batches (`batch.py`). The
order of samples depends on the seed and the settings of `DataSection` only, never on the number of processes, workers or
micro-batches; all random numbers of a sample come from a seed of its own (`training_set.py`). Which sets an epoch draws from
is in `epoch_plan.py`, and where they are read in `location.py`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from data_prep import schema
from pretrain.config import Config
from pretrain.data.batch import Batch, Collate
from pretrain.data.epoch_plan import EpochPlan, plan_epochs
from pretrain.data.held_out import held_out_shards, samples_by_set, select, sets_read
from pretrain.data.location import DataLocation, open_card, read_indexes
from pretrain.data.shard_check import check_shards
from pretrain.data.shard_index import ShardIndex
from pretrain.data.shared_memory import remove_stale_names, unique_names
from pretrain.distributed.world import World, once_per_node
from pretrain.models import DiTConfig
from pretrain.models.text import TEXT_MULTIPLE
from pretrain.state import DataPosition

if TYPE_CHECKING:  # it imports streaming
    from pretrain.data.validation_set import ValidationBatch

# Added to the seed for each rollback: more than any run has epochs, which are added to it, too.
ROLLBACK_OFFSET = 1_000_003


class Loader:
    """An endless iterator over optimizer steps, each a list of micro-batches, from a position on.

    Args:
        config: the run's; `data` and `seed` are used.
        backbone: the model that the data set must fit.
        global_batch: samples of an optimizer step over all processes.
        micro: samples of a micro-batch.
        world: the processes; all of them make a loader together.

    Attributes:
        position: what a checkpoint keeps; it is the next step's.
        steps_per_epoch: optimizer steps of a whole epoch; the last one before shares change may have less.

    Raises:
        ValueError: on all processes: the data set does not fit the model or the batch, is damaged beyond the budget, or its
            cache is in use.
    """

    def __init__(self, config: Config, backbone: DiTConfig, global_batch: int, micro: int, world: World):
        # Late, as streaming takes seconds to import, and a check on the login node needs none of it.
        from pretrain.data.shard_reader import SetStream
        from pretrain.data.training_set import TrainingSet

        self.config, self.global_batch, self.world = config, global_batch, world
        self.location = location = DataLocation.of(config.data)
        self.root = location.root
        self.card = open_card(location, world)
        check_fits(self.card, config, backbone, global_batch)
        self.cache_lock = once_per_node(location.lock_cache, world)
        self.indexes = read_indexes(location, sets_read(self.card, config.data), world)
        missing = check_shards(location, self.indexes, config.data.damaged_shards, world)
        self.held_out = held_out_shards(self.indexes, config.data)
        self.plan = plan_epochs(self.card, config, global_batch, samples_by_set(self.held_out))
        once_per_node(remove_stale_names, world)
        if world.rank == 0:
            print("".join(f"{note}\n" for note in (*self.plan.notes, *missing)), end="", flush=True)
        trained_on = self.indexes
        if self.held_out:
            trained_on = select(self.indexes, lambda shard: shard not in self.held_out)
        draws = self.plan.draws
        streams = [SetStream(location, name, trained_on[name], draws.get(name, 0)) for name in self.plan.sets]
        with unique_names(world):
            self.data = TrainingSet(streams, config, self.card, global_batch // world.size, self.plan)
        self.steps_per_epoch = self.plan.steps_per_epoch
        multiple = TEXT_MULTIPLE if config.model.compile or world.device.type == "cuda" else None
        self.collate = Collate(micro, schema.load_null_text(self.root), config.data.caption_dropout, multiple)
        self._passes = self._data_loader()
        self.resume(DataPosition())

    def _data_loader(self) -> DataLoader:
        """Passes over the data. Its processes live over all of them: small data sets have many short epochs."""
        d = self.config.data
        return DataLoader(
            self.data,
            batch_size=self.data.batch_size,
            collate_fn=self.collate,
            num_workers=d.workers,
            prefetch_factor=d.prefetch if d.workers else None,
            persistent_workers=d.workers > 0,
            timeout=d.timeout if d.workers else 0,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
            worker_init_fn=ignore_signals,
        )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide the order of the data: a checkpoint's position is valid for exactly this."""
        return fingerprint(self.config, self.card, self.indexes, self.plan, self.global_batch)

    def validation_batches(self) -> list[ValidationBatch]:
        """Reads this process's batches of held-out samples. All processes call it. Raises ValueError where one is damaged."""
        if self.config.data.validation is None:
            return []
        from pretrain.data.validation_set import read_validation_batches  # late, as above

        d, shards = self.config.data, self.held_out
        return read_validation_batches(self.location, self.card, d, self.indexes, shards, self.collate, self.world)

    def resume(self, position: DataPosition, rollbacks: int = 0) -> None:
        """Continues at a position of a run with the same fingerprint; after rollbacks with other noise and data order."""
        self.position, self._seed = position, self.config.seed + ROLLBACK_OFFSET * rollbacks

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield from self._epoch()
            self.position = DataPosition(self.position.epoch + 1, 0)

    def _epoch(self) -> Iterator[list[Batch]]:
        done, steps = self.position.step_in_epoch, self.plan.epoch(self.position.epoch).steps
        if done >= steps:
            return
        self.data.start_at(self.position.epoch, done * self.global_batch, self._seed)
        for batches in self._passes:
            # The position moves before the batch is used: what a step's checkpoint keeps is the step after.
            self.position = DataPosition(self.position.epoch, self.position.step_in_epoch + 1)
            yield batches
            if self.position.step_in_epoch == steps:
                return  # where processes would have uneven numbers of samples, streaming repeats some: never a step more
        raise RuntimeError(
            f"{self.config.data.path}: epoch {self.position.epoch} ended after {self.position.step_in_epoch} of "
            f"{steps} steps: a thread of streaming failed, see above"
        )


def ignore_signals(worker: int) -> None:
    """Keeps a worker going when SLURM or a terminal signals all processes, until the training ends it, or a second TERM comes."""
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def fingerprint(
    config: Config, card: schema.Card, indexes: Mapping[str, ShardIndex], plan: EpochPlan, global_batch: int
) -> dict[str, Any]:
    """The settings that decide the order of the data; `indexes` has those of the plan's sets."""
    return order_settings(config, card, global_batch) | {
        "indexes": {name: indexes[name].sha256 for name in plan.sets},
        "draws": [asdict(phase) for phase in plan.phases] if plan.scheduled else plan.draws,
        "held_out": plan.held_out or None,
    }


def order_settings(config: Config, card: schema.Card, global_batch: int) -> dict[str, Any]:
    """The part of the fingerprint that is known before indexes are read."""
    return {
        "data_set": card.fingerprint,
        "resolution": config.data.resolution,
        "seed": config.seed,
        "shuffle_block": config.data.shuffle_block,
        "canonical_nodes": config.data.canonical_nodes,
        "global_batch": global_batch,
    }


def check_fits(card: schema.Card, config: Config, backbone: DiTConfig, global_batch: int) -> None:
    """Raises ValueError for a data set that the model cannot be trained on, naming both sides."""
    path, sets = config.data.path, card.sets_with(config.data.resolution)
    if not card.complete:
        raise ValueError(f"{path} is not finished: parts are missing; run data_prep/encode.py on it again")
    wrong = [
        f"  {name.replace('_', ' ')}: the data set has {there}, the model ({config.model.preset}) takes {here}; "
        f"model.{name}={there} takes the data set's"
        for name, there, here in (
            ("text_width", card.text_encoder["width"], backbone.text_width),
            ("latent_channels", card.vae["channels"], backbone.latent_channels),
        )
        if there != here
    ]
    if config.data.resolution not in card.resolutions:
        held = ", ".join(str(r) for r in card.resolutions)
        wrong.append(f"  resolution: the data set has {held} px, the config asks for {config.data.resolution} px")
    unit = card.vae["downsample"] * backbone.patch if card.buckets else 1
    shapes = [
        [side * config.data.resolution // 16 for side in about["bucket"]] for about in sets.values() if card.buckets
    ]
    if odd := [shape for shape in shapes if shape[0] % unit or shape[1] % unit]:
        wrong.append(
            f"  patch: the data set has pictures of {odd[0][0]} × {odd[0][1]} px, the model ({config.model.preset}) takes "
            f"sides divisible by {unit}, as its patch is {backbone.patch}"
        )
    if wrong:
        raise ValueError(f"{path} does not fit this run:\n" + "\n".join(wrong))
    if config.alignment.weight and card.features is None:
        raise ValueError(
            f"alignment.weight: {config.alignment.weight:g} needs a vision encoder's features, and {path} holds none; encode it "
            "with --features dinov2-base (docs/data.md), or set alignment.weight=0"
        )
    if not sets:
        raise ValueError(f"{path} holds no samples that are large enough for {config.data.resolution} px")
    if card.buckets and global_batch % config.data.canonical_nodes:
        raise ValueError(
            f"data.canonical_nodes: {config.data.canonical_nodes} must divide the global batch of {global_batch}, as "
            f"{path} has buckets"
        )
