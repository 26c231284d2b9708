"""A trained run and its prompts, as the analyses draw them, and the two files that each analysis writes.

Letters: B pictures, C latent channels.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_prep.common.files import atomic_write
from data_prep.common.paths import path
from pretrain.analyze.activations import Receive, watched
from pretrain.models import DiT
from pretrain.pipeline import FocusDiTPipeline, FocusDiTPipelineOutput
from pretrain.sampling.batches import draw_batches
from pretrain.sampling.device import device_of
from pretrain.sampling.jobs import write_png
from pretrain.sampling.options import add_weights_argument, require_at_least
from pretrain.sampling.prompts import read_prompts


def drawing_arguments(parser: argparse.ArgumentParser, pictures: int, batch: int | None = 8) -> None:
    """Adds what all analyses of drawn pictures have, with the defaults of their number and batch; without a batch all are one."""
    parser.add_argument("--prompts", type=path, required=True, help="file of captions, one a line")
    parser.add_argument(
        "--pictures", type=int, default=pictures, help="the number of prompts, from the first on, that are drawn"
    )
    parser.add_argument("--steps", type=int, help="sampling steps (default: the config's preview.steps)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the config's preview.guidance)")
    add_weights_argument(parser)
    if batch is None:
        parser.set_defaults(batch_size=1)
    else:
        parser.add_argument("--batch-size", type=int, default=batch, help="pictures drawn together")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; each next prompt has the next seed")
    parser.add_argument("--device", help="default: the GPU, or the CPU")
    parser.add_argument("--out", type=path, help="folder for figure and table (default: RUN/analyze)")


@dataclass(frozen=True)
class Subject:
    """A model and what it draws: prompt number i from seed + i, whatever the batch."""

    name: str
    pipeline: FocusDiTPipeline
    prompts: list[str]
    steps: int
    guidance: float
    batch: int
    seed: int

    @property
    def dit(self) -> DiT:
        return self.pipeline.transformer.dit

    @property
    def timesteps(self) -> list[float]:
        """Timesteps of the sampling steps, from noise to data; known once something has been drawn."""
        return self.pipeline.scheduler.timesteps.tolist()

    def draw(
        self, decoded: int = 0, masks: bool = False, receive: Receive | None = None
    ) -> Iterator[FocusDiTPipelineOutput]:
        """Draws the prompts, a batch at a time.

        Args:
            decoded: the number of first pictures that are wanted as pictures, not as latents.
            masks: give the query masks, too.
            receive: is given the keys of every forward pass (`activations.watched`), of the half of guidance with captions.
        """
        halves = 1 if self.guidance == 1 else 2
        with nullcontext() if receive is None else watched(self.dit, receive, halves):
            yield from draw_batches(
                self.pipeline,
                self.prompts,
                self.batch,
                self.seed,
                decoded,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                output_query_masks=masks,
            )

    def latents(self) -> Tensor:
        """The latents [B, C, H, W] of all prompts, on the host."""
        drawn = [output.images for output in self.draw()]
        return torch.cat([latents.cpu() for latents in drawn if isinstance(latents, Tensor)])


def read_subject(args: argparse.Namespace, run: Path, name: str, needs_masks: bool = True) -> Subject:
    """A run as the options say. Raises ValueError for numbers without a meaning, or a run without query masks that needs some."""
    require_at_least(
        {
            "--pictures": (args.pictures, 1),
            "--steps": (args.steps, 1),
            "--batch-size": (args.batch_size, 1),
            "--seed": (args.seed, 0),
        }
    )
    prompts = read_prompts(args.prompts)[: args.pictures]
    from pretrain.sampling.trained_run import load_run  # imports DeepSpeed

    pipeline = load_run(run, args.weights, device_of(args.device)).pipeline
    if needs_masks and pipeline.transformer.dit.config.mask == "none":
        raise ValueError(f"{run} was trained without query masks (model.mask=none): give a run of a FocusDiT")
    pipeline.set_progress_bar_config(disable=True)
    steps = pipeline.config.steps if args.steps is None else args.steps
    guidance = pipeline.config.guidance if args.guidance is None else args.guidance
    return Subject(name, pipeline, prompts, steps, guidance, args.batch_size, args.seed)


def relative_distance(latents_BCHW: Tensor, reference_BCHW: Tensor) -> float:
    """‖x − reference‖ / ‖reference‖, in the mean over the pictures."""
    apart_B = (latents_BCHW - reference_BCHW).flatten(1).norm(dim=1)
    return (apart_B / reference_BCHW.flatten(1).norm(dim=1)).mean().item()


def write(out: Path, name: str, picture: Image.Image, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Writes NAME.png and NAME.csv; numbers with all their digits, those that are not finite as `nan` and `inf`.

    Returns:
        a closing line.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    atomic_write(out / f"{name}.csv", text.getvalue())
    write_png(picture, out / f"{name}.png")
    return f"see {out / f'{name}.png'} and {name}.csv"
