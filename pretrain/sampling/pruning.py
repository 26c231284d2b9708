"""Removal of the FFNs that the query masks weigh least: the masks' means, the smaller model, and what is written of both.

Letters: S sampling steps, K blocks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pretrain.checkpoint.export_folder import new_folder
from pretrain.models import DiT, DiTConfig
from pretrain.models.cost import count_parameters
from pretrain.pipeline import FocusDiTPipeline, FocusDiTTransformer2DModel
from pretrain.sampling.batches import draw_batches
from pretrain.sampling.device import device_of
from pretrain.sampling.export_writer import DTYPES, write_export
from pretrain.sampling.options import require_at_least
from pretrain.sampling.pictures import side_by_side
from pretrain.sampling.plots import plot_mask_means
from pretrain.sampling.prompts import read_prompts
from pretrain.sampling.trained_run import TrainedRun, load_run

SHOWN = 8  # pictures of before_after.png


@dataclass(frozen=True)
class MaskMeans:
    """Mask means [S, K] over all prompts, and the first prompts' pictures."""

    means_SK: Tensor
    timesteps: list[float]
    pictures: list[Image.Image]


def measure_masks(
    pipeline: FocusDiTPipeline, prompts: Sequence[str], steps: int | None, batch: int, seed: int
) -> MaskMeans:
    """Draws the prompts and averages their query masks; prompt number i starts from seed + i."""
    total, pictures = None, list[Image.Image]()
    drawn = draw_batches(pipeline, prompts, batch, seed, SHOWN, num_inference_steps=steps, output_query_masks=True)
    for output in drawn:
        assert output.query_masks is not None
        sums_SK = output.query_masks.mean(-1).sum(0)
        total = sums_SK if total is None else total + sums_SK
        if len(pictures) < SHOWN:
            pictures += list(output.images)[: SHOWN - len(pictures)]
    assert total is not None
    return MaskMeans(total / len(prompts), pipeline.scheduler.timesteps.tolist(), pictures)


def check_removable(config: DiTConfig, count: int) -> None:
    """Raises ValueError where a model has no query masks, or not `count` FFNs."""
    if config.mask == "none":
        raise ValueError("this model has no query masks (mask: none), so nothing says which FFN matters least")
    there = config.depth - len(config.removed_ffns)
    if not 0 < count <= there:
        raise ValueError(f"--remove {count}: the model has {there} FFNs; give a number from 1 to {there}")


def lowest_blocks(means_SK: Tensor, removed: Sequence[int], count: int) -> list[int]:
    """The `count` blocks of lowest mean that still have an FFN."""
    means_K = means_SK.mean(0)
    there = sorted((block for block in range(len(means_K)) if block not in removed), key=lambda b: means_K[b].item())
    return sorted(there[:count])


def without_ffns(dit: DiT, blocks: Sequence[int]) -> DiT:
    """The same model without the FFNs of these blocks."""
    config = replace(dit.config, removed_ffns=tuple(sorted({*dit.config.removed_ffns, *blocks})))
    with torch.device("meta"):
        smaller = DiT(config)
    gone = tuple(f"blocks.{block}.ffn." for block in blocks)
    smaller.load_state_dict({k: v for k, v in dit.state_dict().items() if not k.startswith(gone)}, assign=True)
    return smaller.eval()


def run(args: argparse.Namespace) -> str:
    """Prunes a trained run as the options say; all of them are checked before anything is drawn. Returns a closing line.

    Raises:
        ValueError, OSError: an option, the prompts or the run cannot serve.
    """
    require_at_least({"--remove": (args.remove, 1), "--batch-size": (args.batch_size, 1), "--steps": (args.steps, 1)})
    prompts = read_prompts(args.prompts)
    with new_folder(args.out) as writing:
        trained = load_run(args.run, args.weights, device_of(args.device))
        check_removable(trained.pipeline.transformer.dit.config, args.remove)
        trained.pipeline.set_progress_bar_config(disable=True)
        return prune(trained, prompts, args, writing)


def prune(trained: TrainedRun, prompts: Sequence[str], args: argparse.Namespace, out: Path) -> str:
    """Measures, removes, and writes all files into `out`. Returns a closing line."""
    pipeline = trained.pipeline
    dit = pipeline.transformer.dit
    before = measure_masks(pipeline, prompts, args.steps, args.batch_size, args.seed)
    blocks = lowest_blocks(before.means_SK, dit.config.removed_ffns, args.remove)
    smaller = without_ffns(dit, blocks)
    pipeline.register_modules(transformer=FocusDiTTransformer2DModel.of(smaller))
    after = measure_masks(pipeline, prompts[:SHOWN], args.steps, args.batch_size, args.seed)
    parameters = [count_parameters(model.config).total for model in (dit, smaller)]
    report = {
        "removed_ffns": blocks,
        "parameters_before": parameters[0],
        "parameters_after": parameters[1],
        "share_left": parameters[1] / parameters[0],
        "prompts": len(prompts),
        "mean_by_block": before.means_SK.mean(0).tolist(),
        "timesteps": before.timesteps,
        "mean_by_step_and_block": before.means_SK.tolist(),
    }
    line = (
        f"removed the FFNs of blocks {', '.join(map(str, blocks))}: {parameters[1] / 1e6:.1f}M parameters are left, "
        f"{100 * parameters[1] / parameters[0]:.1f}%"
    )
    smaller.to(DTYPES[args.dtype])
    write_export(trained, out, str(args.out), args.encoders == "copy", notes=f"\nPruned: {line}.\n")
    (out / "prune.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot_mask_means(before.means_SK, before.timesteps, blocks).save(out / "prune.png")
    side_by_side(before.pictures, after.pictures, ("before", "after"), prompts).save(out / "before_after.png")
    return line
