"""MDS shards to batches: the fingerprint checked, the order reproducible, the position exact.

Letters: B samples of a micro-batch, C latent channels, E text width, M text tokens of a micro-batch.

One item of the loader is everything that a process needs for one optimizer step, as a list of micro-batches. The order of
samples depends on the seed and the settings of `DataSection` only, never on the number of processes, workers or
micro-batches; and each sample carries a seed of its own (from the run's seed, the epoch, its key, and how often it was drawn
in this epoch before), from which all its random numbers come. Which sets are read, and from where, is in `streams.py`.

A sample that cannot be read is replaced by another one of its set, so that all others stay in their places; the batch says so.
"""

from __future__ import annotations

import hashlib
import math
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import StreamingDataset
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from data_prep import schema as shards
from pretrain.config import Config
from pretrain.data.location import DataLocation, once_per_node, open_card, plan, prepare
from pretrain.data.shard_reader import Damage, SetStream, Shard
from pretrain.data.shared_memory import own_names, remove_stale_names
from pretrain.models import DiTConfig, PackedText
from pretrain.state import DataPosition

# Where a set is drawn in part, so many samples of a shard are taken or left together: fewer shards are fetched for them.
GRANULE = 64
# Added to the seed for each rollback: more than any run has epochs, which are added to it, too.
ROLLBACK_OFFSET = 1_000_003
# So many samples in a row may be unreadable, each in the place of the one before.
ATTEMPTS = 32


@dataclass(frozen=True)
class Batch:
    """A micro-batch, latents in fp16. `std_BCHW` is None where the data set keeps the posteriors' means alone.

    `damaged` are the samples that belong into it, but could not be read: others of their sets are in their places.
    """

    keys: tuple[str, ...]
    seeds: tuple[int, ...]
    text: PackedText
    mean_BCHW: Tensor
    std_BCHW: Tensor | None
    damaged: tuple[Damage, ...] = ()

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The batch on a device, the text in `dtype`, the latents in fp32 (half of that is copied: they are cast there)."""
        std = self.std_BCHW if self.std_BCHW is None else self.std_BCHW.to(device, non_blocking=True).float()
        mean = self.mean_BCHW.to(device, non_blocking=True).float()
        return replace(self, text=self.text.to(device, dtype), mean_BCHW=mean, std_BCHW=std)

    def pin_memory(self) -> Batch:
        std = self.std_BCHW if self.std_BCHW is None else self.std_BCHW.pin_memory()
        return replace(self, text=self.text.pin_memory(), mean_BCHW=self.mean_BCHW.pin_memory(), std_BCHW=std)

    def latent(self, posterior_BCHW: Tensor) -> Tensor:
        """A fresh sample of the VAE's posterior from standard normal numbers."""
        return self.mean_BCHW if self.std_BCHW is None else self.mean_BCHW + self.std_BCHW * posterior_BCHW


@dataclass(frozen=True)
class Sample:
    """One sample, its caption perhaps replaced by the null text; `damaged` are those that it stands in for."""

    key: str
    seed: int
    text: Tensor
    latent: shards.Latent
    damaged: tuple[Damage, ...] = ()


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """The seed of all random numbers of one sample in one epoch."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=7).digest(), "big")


class TrainingSet(StreamingDataset):
    """The samples of one resolution. Set `epoch` and `first` (its first sample) before each pass."""

    def __init__(
        self, streams: list[SetStream], config: Config, card: shards.Card, null_text: Tensor, device_batch: int
    ):
        super().__init__(
            streams=streams,
            batch_size=device_batch,
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
        self.epoch = self.first = 0
        self.null_text, self.text_dtype = null_text, card.text_dtype
        self.run_seed, self.resolution, self.dropout = config.seed, config.data.resolution, config.data.caption_dropout
        self.set_names = [stream.name for stream in streams]
        self.shards: list[Shard] = [Shard(shard) for shard in self.shards]  # type: ignore[assignment]
        self.spanner = _Repeated(self.spanner, self.num_samples)  # type: ignore[assignment]

    def _resume(self, world: Any, epoch: int) -> tuple[int, int]:
        """Where a pass starts. streaming reads it from shared memory, and starts at 0 where somebody removed that."""
        return self.epoch, self.first

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[Any, Any]:
        """An epoch's samples; the number of one that is drawn again counts on behind those of all samples."""
        units, numbers = super().resample_streams(epoch, stream_id)
        if any(stream.repeat > 1 for stream in self.streams):
            numbers = numbers + self.num_samples * times_before(numbers)
        return units, numbers

    def __getitem__(self, at: Any) -> Any:
        repeat, number = divmod(int(at), self.num_samples)
        row, damaged = self._readable(number)
        seed = sample_seed(self.run_seed, self.epoch, f"{row['key']}/{repeat}" if repeat else row["key"])
        dropped = random.Random(seed).random() < self.dropout
        text = self.null_text if dropped else shards.text_of(row, self.text_dtype)
        return Sample(row["key"], seed, text, shards.latent_of(row, self.resolution), damaged)

    def _readable(self, number: int) -> tuple[dict[str, Any], tuple[Damage, ...]]:
        """The row of a sample or, where it cannot be read, of another one; and what could not. Raises ValueError."""
        damaged: list[Damage] = []
        for other in chain([number], self._others(number)):
            try:
                return self.get_item(other), tuple(damaged)
            except (OSError, ValueError) as error:
                shard, place = self.spanner[other]
                name = f"{self.set_names[self.stream_per_shard[shard]]}/{self.shards[shard].stored}"
                damaged.append(Damage(name, int(place), str(error)))
        first = damaged[0]
        raise ValueError(
            f"{first.shard}: sample {first.sample} cannot be read ({first.reason}), nor can any of {ATTEMPTS} others of its "
            "set; run data_prep/verify.py --repair on the data set"
        )

    def _others(self, number: int) -> Iterator[int]:
        """Samples of the same set to stand in for one, the same for any processes.

        For those of one shard they come from one other shard, if that can be read: few are fetched for them.
        """
        shard, place = self.spanner[number]
        stream = self.stream_per_shard[shard]
        first, count = self.shard_offset_per_stream[stream], self.shards_per_stream[stream]
        start = sample_seed(self.run_seed, self.epoch, f"in place of shard {shard}")
        for attempt in range(1, ATTEMPTS + 1):
            other = first + (start + attempt) % count
            yield int(self.sample_offset_per_shard[other] + (place + attempt) % self.samples_per_shard[other])


@dataclass(frozen=True)
class _Repeated:
    """streaming's table of samples, (shard, place in it) by number, for numbers that count on with every repeat."""

    spanner: Any
    size: int

    def __getitem__(self, number: int) -> tuple[int, int]:
        return self.spanner[number % self.size]


def times_before(numbers: np.ndarray) -> np.ndarray:
    """How many times each number stands in the list before."""
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    before = np.empty_like(numbers)
    before[order] = np.arange(len(numbers)) - np.repeat(starts, np.diff(starts, append=len(numbers)))
    return before


@dataclass(frozen=True)
class Collate:
    """Samples of one optimizer step to micro-batches of `micro`."""

    micro: int

    def __call__(self, samples: list[Sample]) -> list[Batch]:
        return [self._batch(samples[i : i + self.micro]) for i in range(0, len(samples), self.micro)]

    def _batch(self, samples: list[Sample]) -> Batch:
        stds = [s.latent.std[None] for s in samples if s.latent.std is not None]
        return Batch(
            keys=tuple(s.key for s in samples),
            seeds=tuple(s.seed for s in samples),
            text=PackedText.pack([s.text[:, :0] for s in samples]).with_tokens(_joined([s.text for s in samples])),
            mean_BCHW=_joined([s.latent.mean[None] for s in samples]),
            std_BCHW=_joined(stds) if stds else None,
            damaged=tuple(damage for s in samples for damage in s.damaged),
        )


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts end to end; in a worker in shared memory from the start, so that they are not copied to be sent."""
    out = None
    if get_worker_info() is not None:
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * parts[0].element_size())
        out = torch.empty(0, dtype=parts[0].dtype).set_(storage).view(shape)
    return torch.cat(parts, out=out)


class Loader:
    """An endless iterator over optimizer steps, each a list of micro-batches, from a position on."""

    def __init__(self, config: Config, backbone: DiTConfig, global_batch: int, micro: int, rank: int, world: int):
        self.config, self.global_batch = config, global_batch
        place = DataLocation.of(config.data)
        self.root = place.root
        self.card = open_card(place, world)
        check_fits(self.card, config, backbone, global_batch)
        self.plan = plan(self.card, config.data, global_batch)
        self.claim = once_per_node(place.claim, world)
        missing = prepare(place, self.plan.draws, config.data.damaged_shards, world)
        once_per_node(remove_stale_names, world)
        if rank == 0:
            print("".join(f"{note}\n" for note in (*self.plan.notes, *missing)), end="", flush=True)
        streams = [SetStream(place, name, choose=count) for name, count in self.plan.draws.items()]
        null_text = shards.load_null_text(self.root)
        with own_names(world):
            self.data = TrainingSet(streams, config, self.card, null_text, global_batch // world)
        self.steps_per_epoch = sum(self.plan.draws.values()) // global_batch
        self.collate = Collate(micro)
        self.resume(DataPosition())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the data order depends on: a checkpoint's position is valid for exactly this."""
        d = self.config.data
        return {
            "data_set": self.card.fingerprint,
            "indexes": {name: _sha256(self.root / name / shards.INDEX) for name in self.plan.draws},
            "draws": self.plan.draws,
            "resolution": d.resolution,
            "seed": self.config.seed,
            "shuffle_block": d.shuffle_block,
            "canonical_nodes": d.canonical_nodes,
            "global_batch": self.global_batch,
        }

    def resume(self, position: DataPosition, rollbacks: int = 0) -> None:
        """Continues at a position of a run with the same fingerprint; after rollbacks with other noise and another order."""
        self.position, self._seed = position, self.config.seed + ROLLBACK_OFFSET * rollbacks

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield from self._epoch()
            self.position = DataPosition(self.position.epoch + 1, 0)

    def _epoch(self) -> Iterator[list[Batch]]:
        done = self.position.step_in_epoch
        if done >= self.steps_per_epoch:
            return
        d = self.config.data
        self.data.epoch, self.data.first = self.position.epoch, done * self.global_batch
        self.data.run_seed = self.data.shuffle_seed = self._seed
        loader = DataLoader(
            self.data,
            batch_size=self.data.batch_size,
            collate_fn=self.collate,
            num_workers=d.workers,
            prefetch_factor=d.prefetch if d.workers else None,
            timeout=d.timeout if d.workers else 0,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
            worker_init_fn=ignore_signals,
        )
        for batches in loader:
            # The position moves before the batch is used: what a step's checkpoint keeps is the step after.
            self.position = DataPosition(self.position.epoch, self.position.step_in_epoch + 1)
            yield batches
            if self.position.step_in_epoch == self.steps_per_epoch:
                return  # several processes repeat samples to be even; that must not make a step that one has not
        raise RuntimeError(
            f"{d.path}: epoch {self.position.epoch} ended after {self.position.step_in_epoch} of {self.steps_per_epoch} "
            "steps: a thread of streaming failed, see above"
        )


def ignore_signals(worker: int) -> None:
    """SLURM signals a task's whole process group: the loader's processes go on until the training ends them, or a second TERM."""
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def check_fits(card: shards.Card, config: Config, backbone: DiTConfig, global_batch: int) -> None:
    """Refuses a data set that the model cannot be trained on, naming both sides."""
    path, sets = config.data.path, card.sets_with(config.data.resolution)
    if not card.complete:
        raise ValueError(f"{path} is not finished: parts are missing; run data_prep/encode.py on it again")
    wrong = [
        f"  {what}: the data set has {there}, the model ({config.model.preset}) takes {here}"
        for what, there, here in (
            ("text width", card.text_encoder["width"], backbone.text_width),
            ("latent channels", card.vae["channels"], backbone.latent_channels),
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
    if not sets:
        raise ValueError(f"{path} holds no samples that are large enough for {config.data.resolution} px")
    if card.buckets and global_batch % config.data.canonical_nodes:
        raise ValueError(
            f"data.canonical_nodes: {config.data.canonical_nodes} must divide the global batch of {global_batch}, as "
            f"{path} has buckets"
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
