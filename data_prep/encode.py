"""Captioned pictures in webdataset tars to MDS shards of text embeddings and latents.

    python data_prep/encode.py --input 'tars/*.tar' --output data/NAME --encoders flan-t5-xxl+mochi --resolutions 256 512

One tar in, one part out. Run it again after a stop: only what is missing is made. Several workers share the tars by
`--worker I --workers N` (slurm/encode.sh is a job array of them); whoever sees the last part done writes the card.
"""

from __future__ import annotations

import argparse
import glob
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data_prep import shards
from data_prep.encoders import DOWNSAMPLE, TextEncoder, Vae, parse_encoders
from data_prep.images import Unusable, decode, resize_and_crop, to_array
from data_prep.tars import Reject, Sample, expected_samples, read_tar


@dataclass(frozen=True)
class Picture:
    """A sample whose image is decoded and cut: pictures [3, r, r] in −1..1 by resolution r."""

    key: str
    caption: str
    width: int
    height: int
    pictures: dict[int, Tensor]


@dataclass
class Tally:
    """What became of a tar's samples: read = written + dropped."""

    read: int = 0
    captions_cut: int = 0
    rejects: list[dict[str, str]] = field(default_factory=list)

    def drop(self, key: str, reason: str, detail: str) -> None:
        """Counts a sample that will not be written."""
        self.rejects.append({"key": key, "reason": reason, "detail": detail})

    def report(self, tar: Path, written: dict[str, int]) -> dict[str, Any]:
        """The part's report, with the samples written by data set."""
        assert self.read == sum(written.values()) + len(self.rejects)
        return {
            "tar": str(tar),
            "bytes": tar.stat().st_size,
            "read": self.read,
            "written": written,
            "dropped": dict(sorted(Counter(r["reason"] for r in self.rejects).items())),
            "captions_cut": self.captions_cut,
            "rejects": self.rejects,
        }


class Encoder:
    """Both frozen encoders and the settings that they are used with."""

    def __init__(self, spec: str, resolutions: list[int], token_cap: int, posterior: str, device: str):
        text, vae = parse_encoders(spec)
        self.text, self.vae = TextEncoder(text, device), Vae(vae, device)
        self.resolutions, self.token_cap, self.posterior = sorted(resolutions), token_cap, posterior

    def card(self) -> shards.Card:
        """The data set's card, its counts still empty."""
        t, v = self.text, self.vae
        return shards.Card(
            text_encoder={"name": t.name, "width": t.width, "fingerprint": t.fingerprint},
            vae={
                "name": v.name,
                "channels": v.channels,
                "downsample": DOWNSAMPLE,
                "normalisation": v.normalisation,
                "fingerprint": v.fingerprint,
            },
            token_cap=self.token_cap,
            posterior=self.posterior,
            resolutions=self.resolutions,
        )

    def records(self, batch: list[Picture], part: str, tally: Tally) -> list[shards.Record]:
        """Encodes a batch: captions together, pictures by resolution."""
        texts, cut = self.text.encode([p.caption for p in batch], self.token_cap)
        tally.captions_cut += len(cut)
        latents: list[dict[int, shards.Latent]] = [{} for _ in batch]
        for resolution in self.resolutions:
            chosen = [i for i, p in enumerate(batch) if resolution in p.pictures]
            # Batches of about one million pixels bound the VAE's memory.
            step = max(1, (1 << 20) // resolution**2)
            for some in (chosen[k : k + step] for k in range(0, len(chosen), step)):
                encoded = self.vae.encode(torch.stack([batch[i].pictures[resolution] for i in some]))
                for i, mean, std in zip(some, encoded.mean, encoded.std, strict=True):
                    latents[i][resolution] = shards.Latent(mean, std if self.posterior == "mean_std" else None)
        return [
            shards.Record(f"{part}/{p.key}", p.caption, text, latent, p.width, p.height)
            for p, text, latent in zip(batch, texts, latents, strict=True)
        ]


def read_pictures(tar: Path, caption_field: str, resolutions: list[int], tally: Tally) -> Iterator[Picture]:
    """The usable samples of a tar; the others are tallied with their reason."""
    for item in read_tar(tar, caption_field):
        tally.read += 1
        if isinstance(item, Reject):
            tally.drop(item.key, item.reason, item.detail)
            continue
        try:
            yield prepare(item, resolutions)
        except Unusable as error:
            tally.drop(item.key, error.reason, str(error))


def prepare(sample: Sample, resolutions: list[int]) -> Picture:
    """Decodes, resizes and crops to every resolution that the image is large enough for. Raises Unusable."""
    image: Image.Image = decode(sample.image)
    fitting = [r for r in resolutions if min(image.size) >= r] or [min(resolutions)]  # too small: the crop says so
    pictures = {r: torch.from_numpy(to_array(resize_and_crop(image, r))) for r in fitting}
    return Picture(sample.key, sample.caption, *image.size, pictures)


def encode_tar(
    tar: Path, part: str, root: Path, card: shards.Card, encoder: Encoder, args: argparse.Namespace
) -> Tally:
    """One tar in, one part out."""
    tally = Tally()
    with shards.PartWriter(root, part, card) as writer:
        for batch in batched(read_pictures(tar, args.caption_field, encoder.resolutions, tally), args.batch):
            for record in encoder.records(batch, part, tally):
                writer.write(record)
        writer.commit(tally.report(tar, writer.written))
    expected = expected_samples(tar)
    if expected is not None and expected != tally.read:
        tqdm.write(f"warning: {tar}: img2dataset wrote {expected} samples, {tally.read} were found", file=sys.stderr)
    return tally


def batched(items: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Lists of `size` items, the last one perhaps shorter (itertools.batched, which Python has from 3.12 on)."""
    batch: list[Picture] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def find_tars(pattern: str) -> dict[str, Path]:
    """The input tars by the name of the part that each becomes. Raises with one clear line."""
    pattern = f"{pattern}/*.tar" if Path(pattern).is_dir() else pattern
    paths = sorted(Path(p) for p in glob.glob(pattern, recursive=True))
    if not paths:
        raise FileNotFoundError(f"--input {pattern}: no such file; quote a pattern so that the shell leaves it whole")
    tars: dict[str, Path] = {}
    for path in paths:
        if path.stem in tars:
            raise ValueError(
                f"{tars[path.stem]} and {path} would both become the part {path.stem}; rename one, or encode them into "
                "two data sets"
            )
        tars[path.stem] = path
    return tars


def open_data_set(root: Path, encoder: Encoder) -> shards.Card:
    """Starts the data set or joins it. Raises ValueError where it was made with other settings."""
    card = encoder.card()
    if not (root / shards.CARD).exists():
        root.mkdir(parents=True, exist_ok=True)
        card.save(root)
    there = shards.Card.load(root).settings()
    if different := [k for k, v in card.settings().items() if there[k] != v]:
        lines = [f"  {k}: there {there[k]}, now {card.settings()[k]}" for k in different]
        raise ValueError(f"{root} was made with other settings; choose another --output:\n" + "\n".join(lines))
    if not (root / shards.NULL_TEXT).exists():
        shards.save_null_text(root, encoder.text.encode([""], encoder.token_cap)[0][0])
    return card


def missing(tars: dict[str, Path], root: Path) -> dict[str, Path]:
    """The tars without a part. Raises ValueError where a part was made of another tar of the same name."""
    todo = {}
    for part, tar in tars.items():
        report = shards.report_of(root, part)
        if report is None:
            todo[part] = tar
        elif report["bytes"] != tar.stat().st_size:
            raise ValueError(
                f"the part {part} was made of {report['tar']} with {report['bytes']} bytes, but {tar} has "
                f"{tar.stat().st_size}; to make it again, remove {root / shards.REPORTS / part}.json"
            )
    return todo


def run(args: argparse.Namespace) -> None:
    """Encodes what is missing of this worker's tars; the worker after whom nothing is missing finishes the data set.

    Raises:
        ValueError: the output was made with other settings or of other tars, or two tars have one name.
        OSError: no such tars or encoders, or no place to write.
    """
    tars, root = find_tars(args.input), args.output
    encoder = Encoder(args.encoders, args.resolutions, args.token_cap, args.posterior, args.device)
    card = open_data_set(root, encoder)
    mine = dict(list(tars.items())[args.worker :: args.workers])
    todo = missing(mine, root)
    print(f"{len(tars)} tars, {len(mine)} of them for this worker, {len(mine) - len(todo)} already encoded", flush=True)
    start, read = time.monotonic(), 0
    for part, tar in tqdm(todo.items(), unit="tar", disable=None):
        tally = encode_tar(tar, part, root, card, encoder, args)
        read += tally.read
        rate = read / (time.monotonic() - start)
        tqdm.write(f"{tar}: read {tally.read}, dropped {len(tally.rejects)} ({rate:.1f} images/s)")
    if missing(tars, root):
        print("done with this worker's share; other parts are still missing")
        return
    print_summary(shards.finish(root, card), root)


def print_summary(card: shards.Card, root: Path) -> None:
    """Prints what was read, written and dropped, by data set and by reason."""
    counts = card.counts
    print(f"{root}: read {counts['read']} = written {counts['written']} + dropped {sum(counts['dropped'].values())}")
    for name, about in card.sets.items():
        print(f"  {name:<12} {about['samples']:>9} samples in {about['shards']} shards")
    for reason, count in counts["dropped"].items():
        print(f"  dropped: {reason:<20} {count}")
    if counts["captions_cut"]:
        print(f"  {counts['captions_cut']} captions were cut to {card.token_cap} tokens")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; a wrong one ends the program with one line."""
    parser = argparse.ArgumentParser(description="Encodes webdataset tars into MDS shards.")
    parser.add_argument("--input", required=True, help="folder of tars, or a quoted pattern of them")
    parser.add_argument("--output", required=True, type=Path, help="the data set's folder")
    parser.add_argument("--encoders", required=True, help="tiny, or TEXT+VAE: names, hub names or folders")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512], help="square sizes in pixels")
    parser.add_argument("--token-cap", type=int, default=300, help="longer captions are cut (default 300)")
    parser.add_argument(
        "--posterior", choices=("mean_std", "mean"), default="mean_std", help="what is kept of a latent"
    )
    parser.add_argument("--caption-field", default="caption", help="field of key.json, where there is no key.txt")
    parser.add_argument("--batch", type=int, default=32, help="samples encoded together")
    parser.add_argument("--worker", type=int, default=0, help="this worker's number, from 0")
    parser.add_argument("--workers", type=int, default=1, help="workers that share the tars")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not 0 <= args.worker < args.workers:
        parser.error(f"--worker {args.worker} must be from 0 to {args.workers - 1} (--workers {args.workers})")
    if bad := [r for r in args.resolutions if r <= 0 or r % DOWNSAMPLE]:
        parser.error(f"--resolutions {bad[0]}: sizes must be above 0 and divisible by {DOWNSAMPLE}")
    if args.token_cap < 1 or args.batch < 1:
        parser.error("--token-cap and --batch must be at least 1")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no GPU here; use --device cpu")
    return args


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"encode: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
