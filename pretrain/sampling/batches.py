"""Prompts drawn in batches: prompt number i starts from seed + i, whatever the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from data_prep.common.progress import Progress
from pretrain.pipeline import FocusDiTPipeline, FocusDiTPipelineOutput


def draw_batches(
    pipeline: FocusDiTPipeline, prompts: Sequence[str], batch: int, seed: int, decoded: int = 0, **options: Any
) -> Iterator[FocusDiTPipelineOutput]:
    """Draws prompts in turn and gives each batch's output.

    Args:
        decoded: the number of first pictures that are wanted as pictures; batches behind them stay latents.
        options: the pipeline's own.
    """
    with Progress(len(prompts), "picture") as progress:
        for i in range(0, len(prompts), batch):
            some = prompts[i : i + batch]
            output = pipeline(
                list(some),
                generator=[torch.Generator().manual_seed(seed + i + k) for k in range(len(some))],
                output_type="pil" if i < decoded else "latent",
                **options,
            )
            assert isinstance(output, FocusDiTPipelineOutput)
            yield output
            progress.update(len(some))
