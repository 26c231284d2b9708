"""MDS shards to batches: the fingerprint checked, the order reproducible, the position exact.

Letters: B samples of a micro-batch, C latent channels, E text width, M text tokens of a micro-batch.

One item of the loader is everything that a process needs for one optimizer step, as a list of micro-batches. The order of
samples depends on the seed and the settings of `DataSection` only, never on the number of processes, workers or
micro-batches; and each sample carries a seed of its own (from the run's seed, the epoch and its key), from which all its
random numbers come.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from streaming import Stream, StreamingDataset
from torch import Tensor
from torch.utils.data import DataLoader

from data_prep import shards
from pretrain.config import Config
from pretrain.models import DiTConfig, PackedText


@dataclass(frozen=True)
class Batch:
    """A micro-batch. `std_BCHW` is None where the data set keeps the posteriors' means alone."""

    keys: tuple[str, ...]
    seeds: tuple[int, ...]
    text: PackedText
    mean_BCHW: Tensor
    std_BCHW: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The batch on a device, the text in `dtype`, the latents in fp32."""
        std = self.std_BCHW if self.std_BCHW is None else self.std_BCHW.to(device, non_blocking=True)
        mean = self.mean_BCHW.to(device, non_blocking=True)
        return replace(self, text=self.text.to(device, dtype), mean_BCHW=mean, std_BCHW=std)

    def pin_memory(self) -> Batch:
        std = self.std_BCHW if self.std_BCHW is None else self.std_BCHW.pin_memory()
        return replace(self, text=self.text.pin_memory(), mean_BCHW=self.mean_BCHW.pin_memory(), std_BCHW=std)

    def latent(self, posterior_BCHW: Tensor) -> Tensor:
        """A fresh sample of the VAE's posterior from standard normal numbers."""
        return self.mean_BCHW if self.std_BCHW is None else self.mean_BCHW + self.std_BCHW * posterior_BCHW


@dataclass(frozen=True)
class Sample:
    """One sample, its caption perhaps replaced by the null text."""

    key: str
    seed: int
    text: Tensor
    latent: shards.Latent


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """The seed of all random numbers of one sample in one epoch."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=7).digest(), "big")


class TrainingSet(StreamingDataset):
    """The samples of one resolution. Set `epoch` before each pass."""

    def __init__(self, streams: list[Stream], config: Config, null_text: Tensor, device_batch: int):
        super().__init__(
            streams=streams,
            batch_size=device_batch,
            shuffle=True,
            shuffle_algo="py1e",
            shuffle_seed=config.seed,
            shuffle_block_size=config.data.shuffle_block,
            num_canonical_nodes=config.data.canonical_nodes,
            allow_unsafe_types=False,
        )
        self.epoch = 0
        self.null_text = null_text
        self.run_seed, self.resolution, self.dropout = config.seed, config.data.resolution, config.data.caption_dropout

    def __getitem__(self, at: Any) -> Any:
        row = super().__getitem__(at)
        seed = sample_seed(self.run_seed, self.epoch, row["key"])
        dropped = random.Random(seed).random() < self.dropout
        text = self.null_text if dropped else shards.text_of(row)
        return Sample(row["key"], seed, text, shards.latent_of(row, self.resolution))


@dataclass(frozen=True)
class Collate:
    """Samples of one optimizer step to micro-batches of `micro`."""

    micro: int

    def __call__(self, samples: list[Sample]) -> list[Batch]:
        return [self._batch(samples[i : i + self.micro]) for i in range(0, len(samples), self.micro)]

    def _batch(self, samples: list[Sample]) -> Batch:
        stds = [s.latent.std for s in samples if s.latent.std is not None]
        return Batch(
            keys=tuple(s.key for s in samples),
            seeds=tuple(s.seed for s in samples),
            text=PackedText.pack([s.text for s in samples]),
            mean_BCHW=torch.stack([s.latent.mean for s in samples]),
            std_BCHW=torch.stack(stds) if stds else None,
        )


@dataclass(frozen=True)
class Position:
    """Where in the data a run is: complete optimizer steps of an epoch."""

    epoch: int = 0
    step_in_epoch: int = 0


class Loader:
    """An endless iterator over optimizer steps, each a list of micro-batches, from a position on."""

    def __init__(self, config: Config, backbone: DiTConfig, global_batch: int, micro: int, rank: int, world: int):
        self.config = config
        self.root = config.data.path
        self.card = shards.Card.load(self.root)
        check_fits(self.card, self.root, config, backbone)
        self.sets = [s for s in shards.sets_with(self.card, config.data.resolution) if s in self.card.sets]
        check_shards(self.root, self.sets)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            remove_stale_shared_memory()
        if world > 1:
            torch.distributed.barrier()
        self.global_batch = global_batch
        streams = [Stream(local=str(self.root / s)) for s in self.sets]
        self.data = TrainingSet(streams, config, shards.load_null_text(self.root), global_batch // world)
        self.steps_per_epoch = len(self.data) // (global_batch // world)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{self.root} has {sum(self.card.sets[s]['samples'] for s in self.sets)} samples for "
                f"{config.data.resolution} px, less than one global batch of {global_batch}"
            )
        self.collate = Collate(micro)
        self.position = Position()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the data order depends on: a checkpoint's position is valid for exactly this."""
        indexes = {s: _sha256(self.root / s / shards.INDEX) for s in self.sets}
        d = self.config.data
        return {
            "data_set": self.card.fingerprint,
            "indexes": indexes,
            "resolution": d.resolution,
            "seed": self.config.seed,
            "shuffle_block": d.shuffle_block,
            "canonical_nodes": d.canonical_nodes,
            "global_batch": self.global_batch,
        }

    def resume(self, position: Position) -> None:
        """Continues at a position of a run with the same fingerprint."""
        self.position = position

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield from self._epoch()
            self.position = Position(self.position.epoch + 1, 0)

    def _epoch(self) -> Iterator[list[Batch]]:
        done = self.position.step_in_epoch
        if done >= self.steps_per_epoch:
            return
        state = self.data.state_dict(done * self.global_batch, from_beginning=True)
        self.data.load_state_dict({**state, "epoch": self.position.epoch, "sample_in_epoch": done * self.global_batch})
        self.data.epoch = self.position.epoch
        d = self.config.data
        loader = DataLoader(
            self.data,
            batch_size=self.data.batch_size,
            collate_fn=self.collate,
            num_workers=d.workers,
            prefetch_factor=d.prefetch if d.workers else None,
            timeout=d.timeout if d.workers else 0,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
        )
        for batches in loader:
            # The position moves before the batch is used: what a step's checkpoint keeps is the step after.
            self.position = Position(self.position.epoch, self.position.step_in_epoch + 1)
            yield batches
        if self.position.step_in_epoch < self.steps_per_epoch:
            raise RuntimeError(
                f"{self.root}: epoch {self.position.epoch} ended after {self.position.step_in_epoch} of "
                f"{self.steps_per_epoch} steps; a shard is missing or damaged: compare the set with its index.json"
            )


def check_fits(card: shards.Card, root: Path, config: Config, backbone: DiTConfig) -> None:
    """Refuses a data set that the model cannot be trained on, naming both sides."""
    if not card.complete:
        raise ValueError(f"{root} is not finished: parts are missing; run data_prep/encode.py on it again")
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
    if wrong:
        raise ValueError(f"{root} does not fit this run:\n" + "\n".join(wrong))
    if not any(s in card.sets for s in shards.sets_with(card, config.data.resolution)):
        raise ValueError(f"{root} holds no samples that are large enough for {config.data.resolution} px")


def check_shards(root: Path, sets: list[str]) -> None:
    """Refuses a data set with missing or cut shards, which would otherwise end an epoch early or hang it."""
    bad = []
    for name in sets:
        for shard in json.loads((root / name / shards.INDEX).read_text())["shards"]:
            about = shard["zip_data"] or shard["raw_data"]
            path = root / name / about["basename"]
            size = path.stat().st_size if path.is_file() else None
            if size != about["bytes"]:
                bad.append(
                    f"  {path}: {'missing' if size is None else f'{size} bytes'}, expected {about['bytes']} bytes"
                )
    if bad:
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(f"{root}: {len(bad)} shards are missing or cut:\n" + "\n".join(bad[:10]) + more)


def remove_stale_shared_memory(folder: Path = Path("/dev/shm")) -> None:
    """Removes what killed runs of streaming left of this user's, and nothing that a living process still maps.

    streaming refuses to start on a data set whose shared memory is still there; its own clean-up would take that of
    other runs on this node, too.
    """
    left = {p for p in folder.glob("[0-9]*_*") if re.fullmatch(r"\d{6}_\w+", p.name) and p.stat().st_uid == os.getuid()}
    if not left:
        return
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process ended, or belongs to somebody else
            mapped |= {line.split(None, 5)[-1].strip() for line in maps.read_text().splitlines() if str(folder) in line}
    for path in left:
        if str(path) not in mapped:
            path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
