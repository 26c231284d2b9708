"""Helpers of many tests: data sets of random samples, and what loaders in one process or in several read of them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import ended, fork, free_port, launcher

from data_prep import schema
from data_prep.common import mds
from data_prep.worker.parts import PartWriter, finish_data_set
from pretrain.config import load
from pretrain.data.batch import Batch
from pretrain.data.loader import Loader
from pretrain.distributed.world import World
from pretrain.models import preset
from pretrain.state import DataPosition

SET = "a/256"  # the set that `write_set` makes of the source a


def record(source: str, i: int, chance: random.Random, bucket: tuple[int, int] | None = None) -> schema.Record:
    generator = torch.Generator().manual_seed(chance.randrange(2**40))
    text = torch.randn(chance.randint(2, 9), 128, generator=generator).bfloat16()
    height, width = (2 * side for side in bucket or (16, 16))
    mean, std = torch.randn(4, height, width, generator=generator), torch.rand(4, height, width, generator=generator)
    latents = {256: schema.Latent(mean, std)}
    return schema.Record(f"{source}/{i:04d}", f"caption é {i}", text, latents, 300, 300, bucket)


def write_set(
    root: Path,
    sources: dict[str, int],
    dtype: str = "bfloat16",
    buckets: bool = False,
    tars: int = 1,
    **options: Any,
) -> Path:
    """A data set of small shards, with so many samples of each source in `tars` tars.

    With buckets a third of them are 14:18, not square.
    """
    choices = {"compression": options.get("compression")}
    vae = {"name": "tiny", "channels": 4, "downsample": 8}
    text = {"name": "tiny", "width": 128}
    card = schema.Card(text, vae, 300, "mean_std", [256], dtype, buckets=buckets, choices=choices)
    for source, count in sources.items():
        chance = random.Random(f"{source}/{options.pop('seed', 0)}")
        for tar in range(tars):
            with PartWriter(root, f"{source}/{tar:05d}", card, "t", shard_bytes=1 << 18, **options) as part:
                for i in range(count * tar // tars, count * (tar + 1) // tars):
                    part.write(record(source, i, chance, ((16, 16) if i % 3 else (14, 18)) if buckets else None))
                part.finish()
                part.commit({"sets": part.sets, "written": part.written}, [])
    finish_data_set(root, card, {})
    schema.save_null_text(root, torch.zeros(1, 128, dtype=torch.bfloat16))
    return root


def loader_of(path: Path, *words: str, global_batch: int = 8, micro: int = 4) -> Loader:
    config = load("demo_256", [f"data.path={path}", *words])[0]
    return Loader(config, preset("focusdit_tiny"), global_batch, micro, World.alone())


def epoch_of(loader: Loader) -> list[Any]:
    """All micro-batches of the loader's next epoch."""
    return [batch for _, step in zip(range(loader.steps_per_epoch), loader, strict=False) for batch in step]


def entry(root: Path, number: int, set_: str = SET) -> dict[str, Any]:
    return json.loads((root / set_ / schema.INDEX).read_text())["shards"][number]


def file_of(root: Path, number: int, set_: str = SET) -> Path:
    about = entry(root, number, set_)
    return root / set_ / (about["zip_data"] or about["raw_data"])["basename"]


def keys_in(root: Path, number: int, set_: str = SET) -> list[str]:
    """The keys of a shard's samples, in order."""
    about = entry(root, number, set_)
    columns = dict(zip(about["column_names"], about["column_encodings"], strict=True))
    return [row["key"] for row in mds.decode_rows(file_of(root, number, set_).read_bytes(), about, columns)]


def places(shard: Path) -> np.ndarray:
    """Where a shard's samples begin, and the last ends."""
    raw = shard.read_bytes()
    return np.frombuffer(raw, "<u4", int.from_bytes(raw[:4], "little") + 1, 4)


def flip(file: Path, at: int, bit: int = 0) -> None:
    with file.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1 << bit]))


def slots(batches: list[Batch]) -> list[tuple[str, int]]:
    return [slot for batch in batches for slot in zip(batch.keys, batch.seeds, strict=True)]


def _read_orders(jobs: list[dict[str, Any]], out: Path) -> None:
    """Reads each job's steps, or notes why it was refused, into `out`."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        torch.distributed.init_process_group("gloo")
    said: list[Any] = []
    for job in jobs:
        config = load("demo_256", job["words"])[0]
        try:
            loader = Loader(config, preset("focusdit_tiny"), 4, 2 // world, World(rank, world, torch.device("cpu")))
        except ValueError as error:
            said.append(str(error))
            continue
        loader.resume(DataPosition(*job["start"]))
        steps: list[dict[str, Any]] = []
        for batches, _ in zip(loader, range(job["steps"]), strict=False):
            shapes = {tuple(b.mean_BCHW.shape[1:]) for b in batches}
            keys = [[key, seed] for b in batches for key, seed in zip(b.keys, b.seeds, strict=True)]
            at = [loader.position.epoch, loader.position.step_in_epoch]
            damaged = [[d.shard, d.sample, d.reason] for b in batches for d in b.damaged]
            steps.append({"keys": keys, "shapes": sorted(shapes), "at": at, "damaged": damaged})
        said.append({"steps_per_epoch": loader.steps_per_epoch, "fingerprint": loader.fingerprint, "steps": steps})
        del loader
    out.write_text(json.dumps(said))


def orders(jobs: list[dict[str, Any]], world: int, folder: Path) -> list[list[dict[str, Any]]]:
    """What each process of `world` reads, by process; the processes write into `folder`."""
    port, outs = str(free_port()), [folder / f"order_{rank}_of_{world}" for rank in range(world)]
    log = folder / f"log_of_{world}"
    started = [fork(log, _read_orders, jobs, out, **launcher(r, world, port)) for r, out in enumerate(outs)]
    assert set(ended(started)) == {0}, log.read_text()
    return [json.loads(out.read_text()) for out in outs]


def joined(by_process: list[dict[str, Any]]) -> list[Any]:
    """Each step's samples over all processes, sorted, with their one shape and the position after it."""
    steps = []
    for parts in zip(*(p["steps"] for p in by_process), strict=True):
        assert len({json.dumps([part["shapes"], part["at"]]) for part in parts}) == 1
        steps.append([sorted(key for part in parts for key in part["keys"]), parts[0]["shapes"], parts[0]["at"]])
    return steps
