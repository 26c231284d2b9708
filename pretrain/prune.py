"""Removal of the FFNs that the query masks weigh least (FocusDiT, §6, Fig. 10).

    python -m pretrain.prune --run runs/stage2_512 --prompts prompts.txt --remove 8 --out exports/pruned

draws the prompts (the paper: 200), averages each block's mask over prompts, steps and tokens, removes the FFNs of the lowest
blocks, and writes the smaller model as an export, with `prune.json`, `prune.png` (the means) and `before_after.png`. The
query masks of those blocks stay, since the next blocks read them.

Letters: S sampling steps, K blocks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data_prep.common.progress import Progress
from pretrain.checkpoint.export_folder import new_folder
from pretrain.console import silence_libraries
from pretrain.models import DiT
from pretrain.models.cost import count_parameters
from pretrain.pipeline import FocusDiTPipeline, FocusDiTPipelineOutput, FocusDiTTransformer2DModel
from pretrain.sampling.device import device_of
from pretrain.sampling.export_writer import DTYPES, add_export_arguments, write_export
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
    total, pictures = None, []
    with Progress(len(prompts), "prompt") as progress:
        for i in range(0, len(prompts), batch):
            some = prompts[i : i + batch]
            output = pipeline(
                list(some),
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed + i + k) for k in range(len(some))],
                output_type="pil" if i < SHOWN else "latent",
                output_query_masks=True,
            )
            assert isinstance(output, FocusDiTPipelineOutput)
            if output.query_masks is None:
                raise ValueError("this model has no query masks (mask: none), so nothing says which FFN matters least")
            sums_SK = output.query_masks.mean(-1).sum(0)
            total = sums_SK if total is None else total + sums_SK
            if i < SHOWN:
                pictures += list(output.images)[: SHOWN - i]
            progress.update(len(some))
    assert total is not None
    return MaskMeans(total / len(prompts), pipeline.scheduler.timesteps.tolist(), pictures)


def lowest_blocks(means_SK: Tensor, removed: Sequence[int], count: int) -> list[int]:
    """The `count` blocks of lowest mean that still have an FFN. Raises ValueError where there are not that many."""
    means_K = means_SK.mean(0)
    there = sorted((block for block in range(len(means_K)) if block not in removed), key=lambda b: means_K[b].item())
    if not 0 < count <= len(there):
        raise ValueError(f"--remove {count}: the model has {len(there)} FFNs; give a number from 1 to {len(there)}")
    return sorted(there[:count])


def without_ffns(dit: DiT, blocks: Sequence[int]) -> DiT:
    """The same model without the FFNs of these blocks."""
    config = replace(dit.config, removed_ffns=tuple(sorted({*dit.config.removed_ffns, *blocks})))
    with torch.device("meta"):
        smaller = DiT(config)
    gone = tuple(f"blocks.{block}.ffn." for block in blocks)
    smaller.load_state_dict({k: v for k, v in dit.state_dict().items() if not k.startswith(gone)}, assign=True)
    return smaller.eval()


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


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Removes the FFNs that the query masks weigh least.")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--prompts", type=Path, required=True, help="file of captions, one a line; the paper took 200")
    parser.add_argument("--remove", type=int, required=True, metavar="K", help="FFNs to remove")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not be there yet")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the config's preview.steps)")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts drawn together")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; each next prompt has the next seed")
    parser.add_argument("--device", help="default: the GPU, or the CPU")
    add_export_arguments(parser)
    args = parser.parse_args(argv)
    silence_libraries()
    try:
        with new_folder(args.out) as writing:
            trained = load_run(args.run, args.weights, device_of(args.device))
            trained.pipeline.set_progress_bar_config(disable=True)
            line = prune(trained, read_prompts(args.prompts), args, writing)
    except (ValueError, OSError) as error:
        print(f"prune: {error}", file=sys.stderr)
        return 1
    print(f"{line}\nsee {args.out / 'prune.png'} and {args.out / 'before_after.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
