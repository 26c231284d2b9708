"""Encoding: the whole pipeline from tars to shards against the bare encoders fed from memory.

A T5-large-sized text encoder and a full-size AutoencoderKL with random weights. The pipeline reads tars of JPEGs, decodes and
cuts them, encodes and writes; the bare encoders get the same batches of token ids and pixels that are in memory already. Both in
turn in one run. Also what one core decodes, which tells how many cores a GPU needs beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from data_prep import schema
from data_prep.encoders import encode_tokens, tokenize
from data_prep.inputs.samples import Sample
from data_prep.inputs.sources import DEFAULT_SOURCE, Job, make_source
from data_prep.inputs.tars import read_tar
from data_prep.pictures.decoders import DecoderPool
from data_prep.pictures.images import Cut, cut
from data_prep.shapes import scenes, tar_of
from data_prep.weights import ASSETS
from data_prep.worker.claims import Claims
from data_prep.worker.encoder import Encoder, Settings
from data_prep.worker.monitor import EncodingMonitor
from data_prep.worker.worker import Worker
from pretrain.bench.timing import side_by_side

SIZES = {
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16, "d_kv": 64},  # T5 v1.1 large
    "small": {"d_model": 256, "d_ff": 512, "num_layers": 2, "num_heads": 4, "d_kv": 64},  # to try the benchmark itself
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tars", type=int, default=4)
    parser.add_argument("--per-tar", type=int, default=8)
    parser.add_argument("--side", type=int, default=768, help="of the JPEGs, in pixels")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--size", choices=tuple(SIZES), default="large")
    parser.add_argument("--decoders", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> str:
    """The table."""
    with tempfile.TemporaryDirectory() as folder, DecoderPool(args.decoders) as pool:
        here = Path(folder)
        spec = _encoders(here, args.size)
        paths = [_tar(here / f"{i:05d}.tar", args, i) for i in range(args.tars)]
        settings = Settings((args.resolution,), False, 300, False, "mean_std")
        encoder = Encoder(spec, settings, args.device)
        samples = [[s for s in read_tar(p) if isinstance(s, Sample)] for p in paths]
        start = time.perf_counter()
        cuts = [[cut(s.image, settings.resolutions) for s in some] for some in samples]
        decoding = (time.perf_counter() - start) / (args.tars * args.per_tar)
        ids = [tokenize(encoder.text.tokenizer, [s.caption for s in some], 300)[0] for some in samples]
        rounds = iter(range(10**6))
        runs = {
            "pipeline": lambda: _pipeline(here / f"data{next(rounds)}", paths, encoder, pool),
            "bare": lambda: _bare(encoder, ids, cuts),
        }
        took = side_by_side(runs, args.rounds, torch.device(args.device))
    count = args.tars * args.per_tar
    tokens = sum(len(i) for some in ids for i in some) / count
    return "\n".join(
        [
            f"{count} JPEGs of {args.side} px in {args.tars} tars, cut to {args.resolution} px; {tokens:.0f} tokens a caption",
            f"  bare encoders        {count / took['bare']:8.3f} images/s",
            f"  whole pipeline       {count / took['pipeline']:8.3f} images/s   ratio {took['bare'] / took['pipeline']:.3f}",
            f"  decoding and cutting {1 / decoding:8.1f} images/s on one core",
        ]
    )


def _encoders(folder: Path, size: str) -> str:
    """Saves both encoders with random weights; returns their spec."""
    text, vae = folder / "text", folder / "vae"
    T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **SIZES[size])).save_pretrained(text)
    AutoTokenizer.from_pretrained(ASSETS / "tiny_t5").save_pretrained(text)
    wide = 4 if size == "large" else 1
    AutoencoderKL(
        block_out_channels=[32 * wide, 64 * wide, 128 * wide, 128 * wide],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
    ).save_pretrained(vae)
    return f"{text}+{vae}"


def _tar(path: Path, args: argparse.Namespace, seed: int) -> Path:
    """Pictures with the detail of photographs, and long captions."""
    rng = np.random.default_rng(seed)
    with tar_of(path) as tar:
        for i, scene in enumerate(scenes(args.per_tar, seed)):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((args.side, args.side), Image.Resampling.BICUBIC), dtype=np.float32)
            noisy = (smooth + rng.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
            jpeg = io.BytesIO()
            Image.fromarray(noisy).save(jpeg, "JPEG", quality=90)
            caption = " and ".join([scene.caption] * int(rng.integers(3, 11)))
            tar.write({"__key__": f"{i:05d}", "jpg": jpeg.getvalue(), "txt": caption})
    return path


def _pipeline(root: Path, paths: list[Path], encoder: Encoder, pool: DecoderPool) -> None:
    one = make_source(DEFAULT_SOURCE, [str(p) for p in paths], None, "")
    jobs: list[Job] = one.jobs()
    root.mkdir()
    with Claims(root / schema.WORK / "claims") as claims, contextlib.redirect_stdout(io.StringIO()):
        monitor = EncodingMonitor(sum(j.bytes for j in jobs), 0, root / schema.WORK / "tensorboard")
        Worker(root, encoder.card("bfloat16"), encoder, jobs, claims, pool, monitor).run()
        monitor.close()


def _bare(encoder: Encoder, ids: list[list[list[int]]], cuts: list[list[Cut]]) -> None:
    for captions, pictures in zip(ids, cuts, strict=True):
        encode_tokens(encoder.text.model, captions, encoder.text.tokenizer.pad_token_id, encoder.device)
        encoder.encode_pictures([c.pictures for c in pictures])
