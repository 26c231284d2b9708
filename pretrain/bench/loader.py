"""Reading: the training loader against bare reading of the same shards, and against two usual layouts of the same samples.

Random samples of T5-XXL's width with captions of 40 to 150 tokens; no encoder runs. The layouts:

    ours          MDS, each caption with its own length in bf16, latents in fp16: read by the training's own `Loader`
    bare          the same shards, read and decoded by streaming alone; what it gives is sent as it is, or not at all
    padded MDS    captions padded to the cap in fp16, as micro_diffusion stores them; each sample to tensors, default collate
    padded npz    a file for each caption and one for each latent, as PixArt-alpha's features; padded fp16, not compressed
                  (PixArt-alpha itself writes fp32 through zip, which is slower to read)

Every loader has the same batch and number of workers. A round is one epoch of each in turn; all files are in the page cache. A
loader's time starts at its first batch, so that the start of its workers does not count.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep import schema
from data_prep.encoders import DOWNSAMPLE
from data_prep.worker.parts import PartWriter, finish_data_set
from data_prep.worker.report import size_text
from pretrain.config import load
from pretrain.data.loader import Loader
from pretrain.distributed.world import World
from pretrain.models import preset

CAP, CHANNELS, SHORTEST, LONGEST = 300, 12, 40, 150
OURS, SENT, BARE, PADDED, FILES = "ours", "bare, sent", "bare, not sent", "padded MDS", "padded npz"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--resolution", type=int, choices=(256, 512), default=256)
    parser.add_argument("--text-width", type=int, default=4096, help="of the text encoder; default T5-XXL's, 4096")
    parser.add_argument("--batch", type=int, default=64, help="samples of a process and step")
    parser.add_argument("--workers", type=int, help="processes of each loader; default: the config's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the samples are written, and removed again")


def run(args: argparse.Namespace) -> str:
    """The table."""
    folder = Path(tempfile.mkdtemp(prefix="bench-loader-", dir=args.folder))
    try:
        _write(folder, args)
        loaders = _loaders(folder, args)
        speeds: dict[str, list[float]] = {name: [] for name in loaders}
        for i in range(args.rounds + 1):
            names = list(loaders)
            for name in names[i % len(names) :] + names[: i % len(names)]:
                speed = _samples_per_second(loaders[name], args)
                if i:
                    speeds[name].append(speed)
        return _table({name: statistics.median(s) for name, s in speeds.items()}, folder, args)
    finally:
        shutil.rmtree(folder)


def _table(speed: dict[str, float], folder: Path, args: argparse.Namespace) -> str:
    sizes = {
        name: sum(p.stat().st_size for p in (folder / place).rglob("*") if p.is_file()) / args.samples
        for name, place in ((OURS, "ours/images/" + str(args.resolution)), (PADDED, "padded"), (FILES, "files"))
    }
    title = f"{args.samples} samples at {args.resolution} px, text width {args.text_width}, captions of {SHORTEST} to {LONGEST}"
    lines = [
        f"{title} tokens (cap {CAP}), batch {args.batch}, {_workers(args)} workers",
        f"  {'':<18}{'samples/s':>12}{'ours / it':>12}{'a sample':>14}{'ours / it':>12}",
    ]
    for name, its in speed.items():
        size = f"{size_text(sizes[name]):>14}{sizes[OURS] / sizes[name]:>12.2f}" if name in sizes else ""
        lines.append(f"  {name:<18}{its:>12.0f}{speed[OURS] / its:>12.2f}{size}")
    return "\n".join(lines)


def _samples_per_second(loader: Callable[[], Iterable[Any]], args: argparse.Namespace) -> float:
    """Samples per second, counted from the first batch on."""
    steps, batches = args.samples // args.batch, iter(loader())
    next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in islice(batches, steps - 1))
    assert count == steps - 1
    return count * args.batch / (time.perf_counter() - start)


def _workers(args: argparse.Namespace) -> int:
    return (
        load(f"stage{args.resolution // 256}_{args.resolution}")[0].data.workers
        if args.workers is None
        else args.workers
    )


# ---- the loaders ----


def _loaders(folder: Path, args: argparse.Namespace) -> dict[str, Callable[[], Iterable[Any]]]:
    workers, side = _workers(args), args.resolution // DOWNSAMPLE
    shape = (2 * CHANNELS, side, side)

    def plain(data: Dataset, collate: Any = None) -> DataLoader:
        prefetch = 2 if workers else None
        return DataLoader(
            data, args.batch, num_workers=workers, prefetch_factor=prefetch, collate_fn=collate, drop_last=True
        )

    def mds(kind: type[StreamingDataset], place: str, **more: Any) -> StreamingDataset:
        return kind(local=str(folder / place), batch_size=args.batch, shuffle=True, **more)

    bare = f"ours/images/{args.resolution}"
    return {
        OURS: lambda: _training(folder / "ours", workers, args),
        SENT: lambda: plain(mds(StreamingDataset, bare), _as_it_is),
        BARE: lambda: plain(mds(StreamingDataset, bare), len),
        PADDED: lambda: plain(mds(_PaddedMds, "padded", width=args.text_width, shape=shape)),
        FILES: lambda: plain(_Files(folder / "files", args.samples)),
    }


def _training(root: Path, workers: int, args: argparse.Namespace) -> Iterator[Any]:
    name = f"stage{args.resolution // 256}_{args.resolution}"
    words = [f"data.path={root}", f"data.workers={workers}", "data.caption_dropout=0", "preview.every=0"]
    config, _ = load(name, words)
    backbone = replace(preset(config.model.preset), text_width=args.text_width)
    return iter(Loader(config, backbone, args.batch, args.batch, World.alone()))


def _as_it_is(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows


class _PaddedMds(StreamingDataset):
    """Reads as micro_diffusion's `StreamingLatentsDataset`."""

    def __init__(self, width: int, shape: tuple[int, ...], **more: Any):
        super().__init__(**more)
        self.width, self.latent_shape = width, shape

    def __getitem__(self, at: Any) -> dict[str, Tensor]:
        row = super().__getitem__(at)
        text = torch.from_numpy(np.frombuffer(row["caption_latents"], np.float16).copy())
        latent = torch.from_numpy(np.frombuffer(row["latents"], np.float16).copy())
        return {"text": text.reshape(1, CAP, self.width), "latent": latent.reshape(self.latent_shape)}


class _Files(Dataset):
    """Reads as PixArt-alpha's `InternalData`, in a random order."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.order = folder, random.Random(0).sample(range(count), count)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        name = f"{self.order[at]:06d}"
        caption = np.load(self.folder / f"{name}.npz")
        return {
            "text": torch.from_numpy(caption["caption_feature"]),
            "mask": torch.from_numpy(caption["attention_mask"]),
            "latent": torch.from_numpy(np.load(self.folder / f"{name}.npy")),
        }


# ---- the samples ----


@dataclass(frozen=True)
class _Random:
    """Captions and latents with random numbers, cut from two long rows of them."""

    text: Tensor
    latent: Tensor

    def records(self, args: argparse.Namespace) -> Iterator[schema.Record]:
        chance, side, width = random.Random(0), args.resolution // DOWNSAMPLE, args.text_width
        for i in range(args.samples):
            length = chance.randint(SHORTEST, LONGEST)
            text = self._cut(self.text, chance, (length, width))
            mean, std = (self._cut(self.latent, chance, (CHANNELS, side, side)) for _ in range(2))
            yield schema.Record(f"{i:06d}", "a caption", text, {args.resolution: schema.Latent(mean, std)}, 640, 640)

    def _cut(self, row: Tensor, chance: random.Random, shape: tuple[int, ...]) -> Tensor:
        count = int(np.prod(shape))
        start = chance.randrange(len(row) - count)
        return row[start : start + count].view(shape)


def _write(folder: Path, args: argparse.Namespace) -> None:
    """The same samples in all three layouts."""
    torch.manual_seed(0)
    longest, latent = LONGEST * args.text_width, CHANNELS * (args.resolution // DOWNSAMPLE) ** 2
    numbers = _Random(torch.randn(8 * longest).bfloat16(), torch.rand(8 * latent).half())
    card = schema.Card(
        {"name": "random", "width": args.text_width},
        {"name": "random", "channels": CHANNELS},
        CAP,
        "mean_std",
        [args.resolution],
    )
    ours, padded, files = folder / "ours", folder / "padded", folder / "files"
    files.mkdir()
    columns = {"caption_latents": "bytes", "latents": "bytes", "caption": "str"}
    with (
        PartWriter(ours, "images/00000", card, "bench") as part,
        MDSWriter(out=str(padded), columns=columns, size_limit=schema.SHARD_BYTES) as mds,
    ):
        for record in numbers.records(args):
            part.write(record)
            text = np.zeros((1, CAP, args.text_width), np.float16)
            text[0, : len(record.text)] = record.text.half().numpy()
            keep = (np.arange(CAP) < len(record.text))[None].astype(np.int16)
            both = record.latents[args.resolution]
            assert both.std is not None
            latents = torch.cat([both.mean, both.std]).numpy()
            mds.write({"caption_latents": text.tobytes(), "latents": latents.tobytes(), "caption": record.caption})
            np.savez(files / f"{record.key}.npz", caption_feature=text, attention_mask=keep)
            np.save(files / f"{record.key}.npy", latents)
        part.finish()
        part.commit({"sets": part.sets, "written": part.written}, [])
    finish_data_set(ours, card, {"read": args.samples})
    schema.save_null_text(ours, torch.zeros(1, args.text_width, dtype=torch.bfloat16))
