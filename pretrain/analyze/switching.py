"""Search for when to switch to more attention mediators while sampling: proposes the ρ of `--mediator-rho` by a small grid.

The first prompts are drawn with the most mediators at all steps, which is the reference; then by the noise level (the
default), with each fewer number at all steps, and by switching at each ρ_1 ≥ ρ_2 ≥ … of a grid. For each: its FLOPs as a
share of the reference's, and how far its latents are from the reference's. What is proposed is the cheapest ρ within the
tolerance, by default half as far away as the fewest mediators at all steps are. A small distance says that little changes,
not that pictures are as good: look at some of them.

Letters: B pictures, S sampling steps, L text tokens, E the text encoder's width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_prep.common.paths import path
from data_prep.common.progress import Progress
from pretrain.analyze.subject import drawing_arguments, relative_distance
from pretrain.diffusion import Guidance, start_noise
from pretrain.diffusion.switching import REFERENCE, change
from pretrain.models.budget_choices import default_budget
from pretrain.models.cost import count_flops
from pretrain.pipeline import FocusDiTPipeline, FocusDiTPipelineOutput
from pretrain.sampling.device import device_of
from pretrain.sampling.plots import to_picture
from pretrain.sampling.prompts import read_prompts
from pretrain.schedulers import SAMPLERS, changed_scheduler

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of steps and pictures, that the default grid lets switch


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--run", type=path, required=True, help="run directory of a model with attention: mediators")
    parser.add_argument("--sampler", choices=tuple(SAMPLERS), help="flow: ode (the default), or sde")
    parser.add_argument("--shift", type=float, help="shift of the times (default: the config's preview.shift)")
    parser.add_argument(
        "--grid", type=float, nargs="+", metavar="RHO", help="values of ρ (default: by the reference's own changes)"
    )
    parser.add_argument(
        "--tolerance", type=float, help="largest relative distance of the latents (default: half that of the fewest)"
    )
    drawing_arguments(parser, pictures=16)


@dataclass(frozen=True)
class Drawn:
    """Pictures by one schedule: latents [B, C, H, W], their numbers of mediators at each step, and each step's change δ."""

    latents: Tensor
    numbers_BS: Tensor
    changes_BS: Tensor

    @property
    def ratios_BS(self) -> Tensor:
        """The changes in units of the reference, the mean of a picture's second to fourth."""
        return self.changes_BS / self.changes_BS[:, REFERENCE].mean(1, keepdim=True)


@dataclass(frozen=True)
class Row:
    """A schedule: what it costs, as a share of the reference, and its mean relative distance from it."""

    name: str
    rho: tuple[float, ...] | None
    drawn: Drawn
    flops: float
    distance: float


@dataclass(frozen=True)
class Subject:
    """A model, prompts that were encoded once, and the settings of their sampling, by which all schedules are compared."""

    pipeline: FocusDiTPipeline
    captions: list[Tensor]
    null: Tensor
    steps: int
    guidance: float
    batch: int
    seed: int

    def draw(self, progress: Progress, **schedule: Any) -> Drawn:
        """Draws all pictures by one schedule, given in the pipeline's own arguments."""
        parts = []
        for i in range(0, len(self.captions), self.batch):
            some = self.captions[i : i + self.batch]
            parts.append(self._draw(some, self.seed + i, schedule))
            progress.update(len(some))
        return Drawn(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _draw(self, captions: list[Tensor], seed: int, schedule: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        seeds = range(seed, seed + len(captions))
        shape = (self.pipeline.transformer.dit.config.latent_channels, *self.pipeline.latent_size())
        latent = start_noise(seeds, shape).to(self.pipeline.device)
        changes: list[Tensor] = []

        def watch(pipeline: Any, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
            nonlocal latent
            changes.append(change(given["latents"], latent))
            latent = given["latents"]
            return given

        embeds, mask = padded(captions)
        output = self.pipeline(
            prompt_embeds=embeds,
            prompt_attention_mask=mask,
            negative_prompt_embeds=self.null[None],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            latents=latent,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            callback_on_step_end=watch,
            output_type="latent",
            **schedule,
        )
        assert isinstance(output, FocusDiTPipelineOutput) and isinstance(output.images, Tensor)
        assert output.mediators_BS is not None
        return output.images.cpu(), output.mediators_BS, torch.stack(changes, dim=1).cpu()

    def flops(self, numbers_BS: Tensor) -> float:
        """FLOPs of all pictures' sampling steps, without what is done once per prompt."""
        pipeline, config = self.pipeline, self.pipeline.transformer.dit.config
        rows, columns = (side // config.patch for side in pipeline.latent_size())
        guidance, text = Guidance(self.guidance), sum(map(len, self.captions)) / len(self.captions)
        total = 0.0
        for s, t in enumerate((pipeline.scheduler.timesteps / 1000).tolist()):
            for n in numbers_BS[:, s].tolist():
                budget = default_budget(config, t, {"mediators": n})
                halves = [text, len(self.null)] if guidance.at(t) else [text]
                total += sum(count_flops(config, (rows, columns), tokens, budget).total for tokens in halves)
        return total


def padded(captions: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Captions as embeddings [B, L, E] and their mask [B, L]."""
    lengths = torch.tensor([len(caption) for caption in captions])
    return pad_sequence(captions, batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]


def run(args: argparse.Namespace) -> str:
    """Searches, and writes figures and plot into the run. Returns the table and the proposal."""
    check(args)
    subject = read_subject(args)
    config = subject.pipeline.transformer.dit.config
    with Progress(len(subject.captions), "picture") as progress:
        reference = subject.draw(progress, mediators=config.mediators.numbers[-1])
    grid = default_grid(reference) if args.grid is None else sorted(set(args.grid), reverse=True)
    schedules: dict[str, dict[str, Any]] = {"by noise level": {}}
    schedules |= {f"{n} at all steps": {"mediators": n} for n in config.mediators.numbers[:-1]}
    for rho in combinations_with_replacement(grid, len(config.mediators.numbers) - 1):
        schedules["ρ " + " ".join(f"{value:g}" for value in rho)] = {"mediator_rho": rho}
    whole, rows = subject.flops(reference.numbers_BS), []
    rows.append(Row(f"{config.mediators.numbers[-1]} at all steps", None, reference, 1.0, 0.0))
    with Progress(len(subject.captions) * len(schedules), "picture") as progress:
        for name, schedule in schedules.items():
            drawn = subject.draw(progress, **schedule)
            share = subject.flops(drawn.numbers_BS) / whole
            apart = relative_distance(drawn.latents, reference.latents)
            rows.append(Row(name, schedule.get("mediator_rho"), drawn, share, apart))
    fewest = next(row for row in rows if row.name == f"{config.mediators.numbers[0]} at all steps")
    tolerance = fewest.distance / 2 if args.tolerance is None else args.tolerance
    proposed = propose(rows, tolerance)
    out = args.out or args.run / "analyze"
    out.mkdir(parents=True, exist_ok=True)
    verdict = "\n".join(conclude(rows, proposed, tolerance))
    settings = {
        "pictures": len(subject.captions),
        "steps": subject.steps,
        "guidance": subject.guidance,
        "sampler": type(subject.pipeline.scheduler).__name__,
        "shift": subject.pipeline.scheduler.config.get("shift"),
        "tolerance": tolerance,
    }
    (out / "mediators.json").write_text(json.dumps(report(rows, proposed, settings), indent=1) + "\n")
    plot(rows, proposed, config.mediators.numbers, tolerance).save(out / "mediators.png")
    return f"{table(rows, config.mediators.numbers)}\n{verdict}\nsee {out / 'mediators.png'} and mediators.json"


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for numbers without a meaning, before anything is loaded."""
    for name, value in (("--pictures", args.pictures), ("--batch-size", args.batch_size)):
        if value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
    if args.steps is not None:
        check_steps(args.steps)
    if args.tolerance is not None and not 0 < args.tolerance < float("inf"):
        raise ValueError(f"--tolerance {args.tolerance}: must be above 0")
    for value in args.grid or ():
        if not 0 < value < float("inf"):
            raise ValueError(f"--grid {value}: must be finite and above 0")


def check_steps(steps: int) -> None:
    """Raises ValueError where no change could lead to more mediators: that of the last step but one is the last that decides."""
    least = REFERENCE.stop + 2
    if steps < least:
        raise ValueError(
            f"--steps {steps}: no change is compared before the {REFERENCE.stop + 1}th; give {least} at least"
        )


def read_subject(args: argparse.Namespace) -> Subject:
    """The run's model and the first prompts. Raises ValueError for a model without mediators to choose from."""
    from pretrain.sampling.trained_run import load_run  # imports DeepSpeed

    prompts = read_prompts(args.prompts)[: args.pictures]
    pipeline = load_run(args.run, args.weights, device_of(args.device)).pipeline
    config = pipeline.transformer.dit.config
    if config.attention != "mediators":
        raise ValueError(f"{args.run} was trained with full attention: there are no mediators to switch between")
    if len(config.mediators.numbers) < 2:
        raise ValueError(
            f"{args.run} was trained with {config.mediators.numbers[0]} mediators alone: nothing to switch between"
        )
    pipeline.scheduler = changed_scheduler(pipeline.scheduler, args.sampler, args.shift)
    pipeline.set_progress_bar_config(disable=True)
    captions, (null,) = pipeline.encode_prompt(prompts), pipeline.encode_prompt([""])
    steps = pipeline.config.steps if args.steps is None else args.steps
    check_steps(steps)
    guidance = pipeline.config.guidance if args.guidance is None else args.guidance
    return Subject(pipeline, captions, null, steps, guidance, args.batch_size, args.seed)


def default_grid(reference: Drawn) -> list[float]:
    """ρ that the reference's changes, the least so far of each picture, fall under at different steps; the highest first."""
    least_BS = reference.ratios_BS[:, REFERENCE.stop : -1].cummin(1).values  # the last change decides nothing
    values = least_BS.flatten().quantile(1 - torch.tensor(SHARES)).tolist()
    return sorted({float(f"{value:.3g}") for value in values}, reverse=True)


def propose(rows: Sequence[Row], tolerance: float) -> Row | None:
    """The cheapest row with ρ within the tolerance; of equals the nearest."""
    within = [row for row in rows if row.rho and row.distance <= tolerance]
    return min(within, key=lambda row: (row.flops, row.distance), default=None)


def conclude(rows: Sequence[Row], proposed: Row | None, tolerance: float) -> list[str]:
    """The proposal in words, and what is as good without switching."""
    said = []
    if proposed is None:
        nearest = min((row for row in rows if row.rho), key=lambda row: row.distance)
        said.append(
            f"no ρ of this grid is within {tolerance:.3g}; the nearest, {nearest.name}, is at {nearest.distance:.3f}"
        )
        limit = 1.0
    else:
        words = " ".join(f"{value:g}" for value in proposed.rho or ())
        said.append(
            f"within {tolerance:.3g} the cheapest switching is --mediator-rho {words}: "
            f"{100 * proposed.flops:.1f}% of the FLOPs at a distance of {proposed.distance:.3f}"
        )
        limit = proposed.flops
    simpler = [row for row in rows if not row.rho and row.distance <= tolerance and row.flops <= limit]
    if simpler:
        best = min(simpler, key=lambda row: (row.flops, row.distance))
        better = "" if proposed is None else ", as good without switching"
        said.append(f"{best.name}: {100 * best.flops:.1f}% of the FLOPs at a distance of {best.distance:.3f}{better}")
    spread = max(row.distance for row in rows)
    if spread <= tolerance:
        said.append(
            f"every row is within {tolerance:.3g} (the farthest at {spread:.3f}): a lower --tolerance would tell more"
        )
    return said


def steps_with(drawn: Drawn, number: int) -> float:
    """Steps with this number of mediators, in the mean over the pictures."""
    return (drawn.numbers_BS == number).sum(1).float().mean().item()


def table(rows: Sequence[Row], numbers: Sequence[int]) -> str:
    """A line for each schedule."""
    width = max(len(row.name) for row in rows) + 2
    lines = [f"{'':<{width}}{'steps with ' + ', '.join(map(str, numbers)):>28}{'FLOPs':>9}{'distance':>11}"]
    for row in rows:
        steps = ", ".join(f"{steps_with(row.drawn, n):.1f}" for n in numbers)
        lines.append(f"{row.name:<{width}}{steps:>28}{100 * row.flops:>8.1f}%{row.distance:>11.4f}")
    return "\n".join(lines)


def report(rows: Sequence[Row], proposed: Row | None, settings: dict[str, Any]) -> dict:
    """The measurements, for mediators.json."""
    return {
        **settings,
        "proposed_rho": None if proposed is None else proposed.rho,
        "changes_of_reference": rows[0].drawn.changes_BS.tolist(),
        "rows": [
            {
                "name": row.name,
                "rho": row.rho,
                "flops": row.flops,
                "distance": row.distance,
                "mean_mediators_by_step": row.drawn.numbers_BS.float().mean(0).tolist(),
            }
            for row in rows
        ],
    }


# ---- the picture ----


def plot(rows: Sequence[Row], proposed: Row | None, numbers: Sequence[int], tolerance: float) -> Image.Image:
    """The changes over the steps, with the switches of the proposal; and cost against distance."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_changes(left, rows[0].drawn, proposed, numbers)
    _plot_cost(right, rows, proposed, tolerance)
    return to_picture(figure)


def _plot_changes(panel: Axes, reference: Drawn, proposed: Row | None, numbers: Sequence[int]) -> None:
    steps = range(1, reference.changes_BS.shape[1] + 1)
    panel.plot(steps, reference.ratios_BS.T.numpy(), color="0.75", linewidth=0.8)
    panel.plot(steps, reference.ratios_BS.mean(0).numpy(), color="black", label=f"{numbers[-1]} mediators, mean")
    for k, n in enumerate(numbers[1:]):
        colour = f"C{k}"
        if proposed is None or proposed.rho is None:
            continue
        panel.axhline(proposed.rho[k], color=colour, linestyle="--", label=f"ρ {proposed.rho[k]:g}: on to {n}")
        reached_BS = proposed.drawn.numbers_BS >= n
        switched = [(b, int(row.int().argmax())) for b, row in enumerate(reached_BS) if row.any()]
        # The change after step s, counted from 1, decides about step s + 1.
        at = [s for _, s in switched]
        panel.scatter(
            at, [proposed.drawn.ratios_BS[b, s - 1].item() for b, s in switched], color=colour, s=18, zorder=3
        )
    panel.set(
        title="change δ of each picture; dots: where it switches",
        xlabel="step",
        ylabel="δ / mean of the second to fourth",
    )
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend()


def _plot_cost(panel: Axes, rows: Sequence[Row], proposed: Row | None, tolerance: float) -> None:
    switching = [row for row in rows if row.rho]
    panel.scatter([100 * row.flops for row in switching], [row.distance for row in switching], s=18, label="switching")
    for k, row in enumerate(row for row in rows if not row.rho):
        place, beside = (100 * row.flops, row.distance), (4, -11 if k % 2 else 5)
        panel.scatter(*place, color="black", marker="s", s=18)
        panel.annotate(row.name, place, beside, textcoords="offset points", fontsize=8)
    if proposed is not None:
        panel.scatter(
            100 * proposed.flops, proposed.distance, s=110, facecolors="none", edgecolors="tab:red", label=proposed.name
        )
    panel.axhline(tolerance, color="tab:red", linestyle=":", label=f"tolerance {tolerance:.3g}")
    panel.set(
        title="cost and distance from the reference", xlabel="FLOPs, %", ylabel="relative distance of the latents"
    )
    highest = max(row.distance for row in rows) or 1.0
    panel.set_ylim(-0.08 * highest, 1.15 * highest)
    panel.margins(x=0.25)
    panel.grid(alpha=0.3)
    panel.legend()
