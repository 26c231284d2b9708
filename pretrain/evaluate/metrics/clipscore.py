"""clipscore: 100 times the cosine of CLIP's embeddings of picture and caption (arXiv 2104.08718), as torchmetrics has it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from data_prep.common.paths import path_or_url
from pretrain.evaluate.clip import Clip
from pretrain.evaluate.metric import Picture, Record, Result, Value
from pretrain.evaluate.pictures import with_prompts

if TYPE_CHECKING:
    import torch


def arguments(parser: argparse.ArgumentParser) -> None:
    """The CLIP."""
    parser.add_argument("--clipscore-model", type=path_or_url, help="CLIP: folder or name on the hub")


def check_prompts(args: argparse.Namespace) -> None:
    """It takes any prompts."""


def build(args: argparse.Namespace, device: torch.device) -> ClipScorer:
    """The CLIP."""
    return ClipScorer(Clip(args.clipscore_model, "--clipscore-model", device))


class ClipScorer:
    """Compares pictures with their captions."""

    batch = 32

    def __init__(self, clip: Clip):
        self._clip = clip
        self.identity: Mapping[str, Any] = {**clip.identity, "resize": clip.resize, "caption tokens": clip.token_cap}

    def score(self, pictures: Sequence[Picture]) -> list[Record]:
        """Each picture's score, and whether its caption was cut."""
        captions_BE, cut = self._clip.captions(with_prompts(pictures, "clipscore"))
        scores_B = 100 * (self._clip.pictures([p.open() for p in pictures]) * captions_BE).sum(-1)
        return [{"score": float(s), "cut": c} for s, c in zip(scores_B, cut, strict=True)]

    def summarise(self, pictures: Sequence[Picture], records: Sequence[Record]) -> Result:
        """The mean, which is never below zero, and the number of captions that were cut."""
        mean = Value.mean([r["score"] for r in records])
        cut = sum(r["cut"] for r in records)
        notes = {f"captions cut to {self._clip.token_cap} tokens": cut} if cut else {}
        return Result({"clipscore": replace(mean, value=max(mean.value, 0.0))}, notes)
