"""Removing the FFNs that the query masks weigh least (FocusDiT, Fig. 10): masks by block, parameters left, deviation of latents.

Blocks go in the order of their masks' mean over prompts (the paper: 200), steps and tokens, the lowest first. `prune.csv` has a
line for each number of removed FFNs: the block that goes last, its mask's mean and range over the steps, the parameters left,
and, where it was drawn, the relative deviation of the latents from those of the whole model. `python -m pretrain.prune`
writes such a model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from data_prep.common.paths import path
from pretrain.analyze.masks import Masks
from pretrain.analyze.subject import Subject, drawing_arguments, read_subject, relative_distance, write
from pretrain.models.cost import count_parameters
from pretrain.pipeline import FocusDiTTransformer2DModel
from pretrain.sampling.options import require_at_least
from pretrain.sampling.plots import COLOURS, to_picture
from pretrain.sampling.pruning import check_removable, lowest_blocks, without_ffns

HEADER = ("removed", "block", "mask_mean", "mask_min", "mask_max", "parameters", "share_left", "latent_deviation")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--run", type=path, required=True, help="run directory of a model with query masks")
    parser.add_argument(
        "--remove",
        type=int,
        nargs="+",
        help="numbers of FFNs without which pictures are drawn (default: up to 8 of all)",
    )
    parser.add_argument("--compared", type=int, default=16, help="pictures drawn for each of these numbers")
    drawing_arguments(parser, pictures=200)


@dataclass(frozen=True)
class Removal:
    """A model without some FFNs. `block` is the one that went last; `deviation` is None where nothing was drawn."""

    removed: int
    block: int | None
    parameters: int
    deviation: float | None


def run(args: argparse.Namespace) -> str:
    """Draws and removes; writes figure and table. Returns a closing text."""
    require_at_least({"--compared": (args.compared, 1)})
    subject = read_subject(args, args.run, args.run.name)
    config = subject.dit.config
    there = config.depth - len(config.removed_ffns)
    counts = sorted({-(-there * i // 8) for i in range(1, 9)}) if args.remove is None else sorted(set(args.remove))
    for count in counts:
        check_removable(config, count)
    masks = Masks()
    for output in subject.draw(masks=True):
        assert output.query_masks is not None
        masks.add(output.query_masks)
    means_SK = masks.figures()[0]
    removals = remove(replace(subject, prompts=subject.prompts[: args.compared]), means_SK, counts)
    closing = write(
        args.out or args.run / "analyze", "prune", plot(means_SK, removals), HEADER, rows(means_SK, removals)
    )
    last = next(one for one in removals if one.removed == counts[-1])
    share = last.parameters / removals[0].parameters
    return f"without {last.removed} of {there} FFNs {100 * share:.1f}% of the parameters are left\n{closing}"


def remove(subject: Subject, means_SK: Tensor, counts: Sequence[int]) -> list[Removal]:
    """Every number of removed FFNs; those of `counts` draw the subject's pictures.

    Raises:
        ValueError: a block's masks are NaN, so that there is no order.
    """
    if damaged := [str(k) for k in means_SK.mean(0).isnan().nonzero().flatten().tolist()]:
        raise ValueError(
            f"the query masks of blocks {', '.join(damaged)} are NaN, so no order of the blocks is known; "
            "python -m pretrain.analyze masks shows them"
        )
    dit, gone = subject.dit, subject.dit.config.removed_ffns
    order = [lowest_blocks(means_SK, gone, n) for n in range(dit.config.depth - len(gone) + 1)]
    reference = subject.latents()
    found = [Removal(0, None, count_parameters(dit.config).total, 0.0)]
    for n, blocks in enumerate(order[1:], start=1):
        smaller = replace(dit.config, removed_ffns=tuple(sorted({*gone, *blocks})))
        deviation = None
        if n in counts:
            subject.pipeline.register_modules(transformer=FocusDiTTransformer2DModel.of(without_ffns(dit, blocks)))
            deviation = relative_distance(subject.latents(), reference)
        (block,) = set(blocks) - set(order[n - 1])
        found.append(Removal(n, block, count_parameters(smaller).total, deviation))
    subject.pipeline.register_modules(transformer=FocusDiTTransformer2DModel.of(dit))
    return found


def rows(means_SK: Tensor, removals: Sequence[Removal]) -> list[list[object]]:
    """The lines of the table."""
    found: list[list[object]] = []
    for one in removals:
        mask: list[object] = ["", "", ""]
        if one.block is not None:
            of_block_S = means_SK[:, one.block]
            mask = [of_block_S.mean().item(), of_block_S.min().item(), of_block_S.max().item()]
        block, deviation = ("" if value is None else value for value in (one.block, one.deviation))
        found.append([one.removed, block, *mask, one.parameters, one.parameters / removals[0].parameters, deviation])
    return found


def plot(means_SK: Tensor, removals: Sequence[Removal]) -> Image.Image:
    """The masks by block with their range over the steps; parameters left, and deviation, over the removed FFNs."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    mean_K = means_SK.mean(0)
    reach = torch.stack([mean_K - means_SK.amin(0), means_SK.amax(0) - mean_K])
    left.bar(range(len(mean_K)), mean_K.tolist(), yerr=reach.tolist(), color=COLOURS[0], ecolor="black", capsize=2)
    left.set(xlabel="block (line: over the timesteps)", ylabel="mean of the query mask", ylim=(0, 1.05))
    whole, numbers = removals[0].parameters, [one.removed for one in removals]
    middle.plot(numbers, [100 * one.parameters / whole for one in removals], color=COLOURS[0], marker="o", markersize=3)
    middle.set(ylabel="parameters left (%)")
    drawn = [(one.removed, one.deviation) for one in removals if one.deviation is not None]
    right.plot(*zip(*drawn, strict=True), color=COLOURS[1], marker="s", markersize=4)
    right.set(ylabel="relative deviation of the latents")
    for panel in (middle, right):
        panel.set_xlabel("FFNs removed, the lowest masks first")
        panel.grid(alpha=0.3)
    for panel in (left, middle, right):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_ylim(bottom=0)
    return to_picture(figure)
