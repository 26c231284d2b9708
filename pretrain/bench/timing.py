"""Timing things side by side, and the models that several benchmarks time."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from pretrain.models import DiTConfig

# Seconds by the clock on the wall, or those that CPUs spent on this process: what a machine that others use, too, can tell.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def side_by_side(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, clock: str = "wall"
) -> dict[str, float]:
    """Median seconds of each. All are taken in turn, each round from another one on; the first round does not count."""
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            _wait(device)
            start = now()
            runs[name]()
            _wait(device)
            if i:
                times[name].append(now() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def pixart(c: DiTConfig) -> PixArtTransformer2DModel:
    """diffusers' transformer of `PixArtAlphaPipeline`, of the same size."""
    return PixArtTransformer2DModel(
        num_attention_heads=c.heads,
        attention_head_dim=c.width // c.heads,
        in_channels=c.latent_channels,
        out_channels=c.latent_channels,
        num_layers=c.depth,
        cross_attention_dim=c.width,
        caption_channels=c.text_width,
        patch_size=c.patch,
        sample_size=32,
        use_additional_conditions=False,
    )


def padded(captions: list[Tensor], cap: int) -> tuple[Tensor, Tensor]:
    """Captions [B, cap, E] with zeros behind, and 1 where there is a token [B, cap]."""
    rows = [nn.functional.pad(c, (0, 0, 0, cap - len(c))) for c in captions]
    keep = [(torch.arange(cap, device=c.device) < len(c)).to(c.dtype) for c in captions]
    return torch.stack(rows), torch.stack(keep)


def model_arguments(
    parser: argparse.ArgumentParser, preset: str, batch: int, rounds: int, depth: int | None = 4
) -> None:
    """The arguments of benchmarks that time a backbone."""
    parser.add_argument("--preset", default=preset)
    parser.add_argument("--depth", type=int, default=depth, help="blocks to build (0: the preset's own); default 4")
    parser.add_argument("--tokens-per-side", type=int, default=16, help="16 is 256 px with patch 2, 32 is 512 px")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
