"""Encoder of a worker: windows of pictures and captions to records, with the frozen encoders.

A window's captions are encoded by length and its pictures by shape, so that batches have little padding; what is encoded
together comes from one tar and follows from its samples alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_prep import schema
from data_prep.encoders import (
    DOWNSAMPLE,
    FEATURE_CELL,
    TextEncoder,
    Vae,
    encode_tokens,
    pixels_to_floats,
    tokenize,
)
from data_prep.features import VisionEncoder
from data_prep.pictures.images import Cut
from data_prep.weights import parse_encoders
from data_prep.worker.report import Tally

# Least peak signal-to-noise ratio, in dB, with which the small VAE gives pictures back that it serves: shapes had 32 to 37
# at 256 px, a photograph 16.
TINY_FIDELITY = 25.0
FIDELITY_PICTURES = 5  # that it is judged by, once for each worker


@dataclass(frozen=True)
class Settings:
    """Settings by which samples become records, the same for every source.

    Attributes:
        resolutions: in pixels.
        buckets: pictures keep about their aspect ratio, instead of being cut to squares.
        token_cap: the most tokens of a caption.
        drop_long: samples with longer captions are dropped, instead of the captions being cut.
        max_unknown: samples are dropped of whose caption a larger share of the tokens is unknown to the text encoder.
        posterior: what is stored of a latent: mean_std | mean.
        compression: of the shards: None, "zstd" or "zstd:LEVEL".
        shard_bytes: the largest size of a shard.
    """

    resolutions: tuple[int, ...]
    buckets: bool
    token_cap: int
    drop_long: bool
    posterior: str
    compression: str | None = None
    shard_bytes: int = schema.SHARD_BYTES
    max_unknown: float | None = None


@dataclass(frozen=True)
class Picture:
    """A sample whose picture is decoded and cut; `number` is its place in its tar, from 0."""

    number: int
    key: str
    caption: str
    cut: Cut
    caption_field: str = ""


class Encoder:
    """The frozen text encoder and VAE and, if `features` names one, a vision encoder, with the settings they are used with."""

    def __init__(self, spec: str, settings: Settings, device: str, compile_: bool = False, features: str | None = None):
        text, vae = parse_encoders(spec)
        self.text, self.vae, self.settings = TextEncoder(text, device), Vae(vae, device), settings
        self.vision = None if features is None else VisionEncoder(features, device)
        self.device = torch.device(device)
        if compile_:
            self.text.model.compile(dynamic=True)
            self.vae.model.encoder.compile()
            if self.vision is not None:
                self.vision.model.compile()

    def card(self, text_dtype: str, features_dtype: str = "float16") -> schema.Card:
        """Returns the data set's card, its counts still empty."""
        t, v, s, f = self.text, self.vae, self.settings, self.vision
        features = None
        if f is not None:
            about = {"name": f.name, "width": f.width, "cell": FEATURE_CELL}
            features = {**about, "dtype": features_dtype, "fingerprint": f.fingerprint}
        return schema.Card(
            text_encoder={"name": t.name, "width": t.width, "fingerprint": t.fingerprint},
            vae={
                "name": v.name,
                "channels": v.channels,
                "downsample": DOWNSAMPLE,
                "normalisation": v.normalisation,
                "fingerprint": v.fingerprint,
            },
            token_cap=s.token_cap,
            posterior=s.posterior,
            resolutions=sorted(s.resolutions),
            text_dtype=text_dtype,
            buckets=s.buckets,
            features=features,
        )

    def encode(self, window: list[Picture], name: str, tally: Tally) -> tuple[list[schema.Record], Callable[[], None]]:
        """Returns the records of a window of the tar `name`, and a function to call before they are read.

        The function waits for the copies from a GPU, which may still be under way. Captions that are too long are
        counted in `tally`, or their samples dropped.
        """
        ids, too_long = tokenize(self.text.tokenizer, [p.caption for p in window], self.settings.token_cap)
        unknown = [i.count(self.text.tokenizer.unk_token_id) for i in ids]
        kept = []
        for n, picture in enumerate(window):
            words = len(ids[n]) - 1  # without the end token
            if self.settings.drop_long and n in too_long:
                detail = f"{self.settings.token_cap} tokens are not enough for {len(too_long[n])} more characters"
                tally.drop(picture.number, picture.key, "caption_too_long", detail)
            elif self.settings.max_unknown is not None and unknown[n] > self.settings.max_unknown * words:
                detail = f"{unknown[n]} of {words} tokens are unknown to {self.text.name}"
                tally.drop(picture.number, picture.key, "unknown_tokens", detail)
            else:
                tally.count_caption(picture.caption_field, n in too_long, unknown[n])
                kept.append(n)
        window, ids = [window[n] for n in kept], [ids[n] for n in kept]
        texts = encode_tokens(self.text.model, ids, self.text.tokenizer.pad_token_id, self.device)
        latents, features = self.encode_pictures([p.cut.pictures for p in window])
        ready = _no_wait
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            ready = event.synchronize
        return [
            schema.Record(f"{name}/{p.key}", p.caption, text, latent, p.cut.width, p.cut.height, p.cut.bucket, feature)
            for p, text, latent, feature in zip(window, texts, latents, features, strict=True)
        ], ready

    def unsuited(self, window: list[Picture]) -> str | None:
        """A warning where the small VAE that ships does not serve these pictures; None where it does, and for other VAEs."""
        if self.vae.name != "tiny":
            return None
        ratios = []
        for picture in window[:FIDELITY_PICTURES]:
            pixels_HW3 = picture.cut.pictures[min(picture.cut.pictures)]
            given = pixels_to_floats(torch.from_numpy(pixels_HW3)[None], self.device)
            back = self.vae.decode(self.vae.start_encoding(given).mean.float()).clamp(-1, 1)
            error = ((back - given) ** 2).mean().item() / 4  # of values in 0..1
            ratios.append(-10 * math.log10(max(error, 1e-10)))
        ratio = sorted(ratios)[len(ratios) // 2]
        if ratio >= TINY_FIDELITY:
            return None
        return (
            f"warning: the VAE tiny was trained on drawn shapes; these pictures come back from it with {ratio:.0f} dB, as smears "
            f"(shapes: above 30): for photographs take --encoders flan-t5-xxl+mochi, or another pair of --help"
        )

    def encode_pictures(
        self, pictures: list[dict[int, Any]]
    ) -> tuple[list[dict[int, schema.Latent]], list[dict[int, Tensor]]]:
        """Returns the latents and the features of each sample by resolution; pictures of one shape are encoded together."""
        latents: list[dict[int, schema.Latent]] = [{} for _ in pictures]
        features: list[dict[int, Tensor]] = [{} for _ in pictures]
        shapes: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for n, cuts in enumerate(pictures):
            for resolution, pixels_HW3 in cuts.items():
                shapes.setdefault(pixels_HW3.shape, []).append((n, resolution))
        for (height, width, _), cuts_of_shape in sorted(shapes.items()):
            step = max(1, pixels_at_once(self.device) // (height * width))
            for batch in (cuts_of_shape[k : k + step] for k in range(0, len(cuts_of_shape), step)):
                pixels_BHW3 = torch.stack([torch.from_numpy(pictures[n][r]) for n, r in batch])
                pixels_B3HW = pixels_to_floats(pixels_BHW3, self.device)
                encoded = self.vae.start_encoding(pixels_B3HW)
                stds = encoded.std if self.settings.posterior == "mean_std" else [None] * len(batch)
                for (n, r), mean, std in zip(batch, encoded.mean, stds, strict=True):
                    latents[n][r] = schema.Latent(mean, std)
                if self.vision is not None:
                    for (n, r), vectors in zip(batch, self.vision.start_encoding(pixels_B3HW), strict=True):
                        features[n][r] = vectors
        return latents, features


def pixels_at_once(device: torch.device) -> int:
    """Pixels that the VAE encodes together; on a CPU fewer, which takes a fifth less memory and no more time."""
    return 1 << 18 if device.type == "cpu" else 1 << 20


def _no_wait() -> None: ...
