"""Pictures of many prompts: which are to be drawn by this process, the drawing in batches, and the summary of all."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_prep.common.files import atomic_write
from data_prep.common.progress import Progress
from data_prep.common.words import counted
from data_prep.encoders import DOWNSAMPLE, fingerprint
from data_prep.pictures.grids import labelled_grid
from pretrain.checkpoint.export_folder import read_json
from pretrain.compilation import compile_for_sampling
from pretrain.diffusion import FfnWork
from pretrain.distributed.launcher import adopt_launcher
from pretrain.models.cost import saved_flops
from pretrain.pipeline import FocusDiTPipeline, FocusDiTPipelineOutput
from pretrain.recipes import recipe_of
from pretrain.sampling.device import device_of
from pretrain.sampling.jobs import Job, is_drawn, undrawn, write_png
from pretrain.sampling.options import require_at_least
from pretrain.sampling.page import PageEntry, page
from pretrain.sampling.pictures import mask_map
from pretrain.sampling.prompts import read_prompts
from pretrain.schedulers import changed_scheduler

SHOWN = 256  # pictures on the contact sheet and the page


def run(args: argparse.Namespace) -> str:
    """Draws this process's pictures; the process that finds all pictures drawn writes the summary. Returns a closing line."""
    check_numbers(args)
    drawn = draw_share(args, [*args.prompt, *(read_prompts(args.prompts) if args.prompts else [])])
    if drawn.saved is not None:
        print(f"skipping left out {100 * drawn.saved:.1f}% of the FFNs' FLOPs")
    left = [job for job in drawn.jobs if not is_drawn(job, args.out, args.save_masks)]
    if left:
        line = f"{counted(len(drawn.mine), 'picture')} in {args.out}"
        return f"{line}; {len(left)} of {len(drawn.jobs)} are still to be drawn by other processes"
    return write_summary(drawn.jobs, drawn.origin, args)


@dataclass(frozen=True)
class Drawn:
    """What a process has drawn.

    Attributes:
        jobs: all pictures, those of other processes too.
        mine: those that this process drew now.
        origin: the run or model that they come from.
        saved: the share of the FFNs' FLOPs that skipping left out; None without skipping.
    """

    jobs: list[Job]
    mine: list[Job]
    origin: dict[str, Any]
    saved: float | None


def draw_share(args: argparse.Namespace, prompts: Sequence[str]) -> Drawn:
    """Draws the pictures of this process that are missing, one for each prompt, from the seeds `args.seed` on."""
    rank, processes = share_of_process()
    pipeline, origin = load_pipeline(args, device_of(args.device))
    if args.save_masks and pipeline.transformer.dit.config.mask == "none":
        raise ValueError("--save-masks: this model has no query masks")
    settings = settings_of(args, pipeline)
    jobs = [Job(i, prompt, args.seed + i, settings) for i, prompt in enumerate(prompts)]
    args.out.mkdir(parents=True, exist_ok=True)
    todo = [job for job in undrawn(jobs, args.out, args.save_masks, args.overwrite) if job.index % processes == rank]
    compile_for_sampling(pipeline.transformer, pipeline.transformer.dit, args.compile)
    return Drawn(jobs, todo, origin, draw(pipeline, todo, args))


def share_of_process() -> tuple[int, int]:
    """This process's number and that of all processes, as a launcher says them; job number i is process i mod all's."""
    if "RANK" not in os.environ:  # else all is said: no rendezvous is needed here
        adopt_launcher()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_numbers(args: argparse.Namespace) -> None:
    """Raises ValueError for numbers without a meaning, before anything is loaded."""
    require_at_least({"--batch-size": (args.batch_size, 1), "--steps": (args.steps, 1), "--seed": (args.seed, 0)})
    if args.seed >= 1 << 62:
        raise ValueError(f"--seed {args.seed}: must be under 2**62")
    if args.step is not None and args.run is None:
        raise ValueError("--step: a checkpoint of --run; give --run")
    if args.shift is not None and not 0 < args.shift < float("inf"):
        raise ValueError(f"--shift {args.shift}: must be above 0")


def load_pipeline(args: argparse.Namespace, device: torch.device) -> tuple[FocusDiTPipeline, dict[str, Any]]:
    """The pipeline of `--run` or `--model`, and where it comes from."""
    if args.run:
        from pretrain.sampling.trained_run import load_run  # imports DeepSpeed, which an export does not need

        trained = load_run(args.run, args.weights, device, recipe_of(args.recipe or "plain"), args.step)
        pipeline, origin = trained.pipeline, {"run": str(args.run), "step": trained.step, "weights": args.weights}
    else:
        if not args.model.is_dir():
            raise FileNotFoundError(f"no export at {args.model}: make one with python -m pretrain.export")
        recipe = recipe_of(args.recipe or model_recipe(args.model))
        pipeline = FocusDiTPipeline.from_pretrained(args.model, torch_dtype=recipe.dtypes(device)).to(device)
        origin = {"model": str(args.model)}
    pipeline.scheduler = changed_scheduler(pipeline.scheduler, args.sampler, args.shift)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, origin


def model_recipe(folder: Path) -> str:
    """The recipe that an export draws by; the folder itself is checked when it is loaded."""
    index = folder / "model_index.json"
    return str(read_json(index).get("recipe", "plain")) if index.is_file() else "plain"


def settings_of(args: argparse.Namespace, pipeline: FocusDiTPipeline) -> dict[str, Any]:
    """The settings that a picture depends on, beside its prompt and seed."""
    recipe, steps, guidance = pipeline.defaults(args.recipe)
    height, width = (side * DOWNSAMPLE for side in pipeline.latent_size(args.height, args.width))
    return {
        "data_fingerprint": (pipeline.config.data_fingerprint or "")[:16],  # of the encoders, too
        "weights_fingerprint": fingerprint(pipeline.transformer, {"backbone": str(pipeline.transformer.dit.config)})[
            :16
        ],
        "height": height,
        "width": width,
        "scheduler": type(pipeline.scheduler).__name__,
        "shift": pipeline.scheduler.config.get("shift"),
        "steps": steps if args.steps is None else args.steps,
        "guidance": guidance if args.guidance is None else args.guidance,
        "guidance_interval": list(args.guidance_interval),
        "negative_prompt": args.negative_prompt,
        "skip_threshold": args.skip_threshold,
        "skip_unit": args.skip_unit if args.skip_threshold is not None else None,
        "mediators": args.mediators,
        "mediator_rho": args.mediator_rho,
        # Pictures of earlier versions say nothing of it.
        **({} if recipe.name == "plain" else {"recipe": recipe.name}),
    }


def draw(pipeline: FocusDiTPipeline, todo: Sequence[Job], args: argparse.Namespace) -> float | None:
    """Draws the jobs in batches; each picture is written whole. Returns the share of the FFNs' FLOPs that skipping saved."""
    config, saved, whole = pipeline.transformer.dit.config, 0.0, 0.0
    with Progress(len(todo), "picture") as progress:
        for i in range(0, len(todo), args.batch_size):
            jobs = todo[i : i + args.batch_size]
            work = draw_batch(pipeline, jobs, args)
            progress.update(len(jobs))
            if work is not None:
                saved += saved_flops(config, work.kept_SK, work.tokens_SK).sum().item()
                whole += saved_flops(config, torch.zeros(1), work.tokens_SK).sum().item()
    return saved / whole if whole else None


def draw_batch(pipeline: FocusDiTPipeline, jobs: Sequence[Job], args: argparse.Namespace) -> FfnWork | None:
    """Draws some jobs, which share all settings, together."""
    settings = jobs[0].settings
    output = pipeline(
        [job.prompt for job in jobs],
        height=settings["height"],
        width=settings["width"],
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        guidance_interval=settings["guidance_interval"],
        negative_prompt=settings["negative_prompt"],
        generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
        skip_threshold=settings["skip_threshold"],
        skip_unit=args.skip_unit,
        output_query_masks=args.save_masks,
        mediators=settings["mediators"],
        mediator_rho=settings["mediator_rho"],
        recipe=settings.get("recipe", "plain"),
    )
    assert isinstance(output, FocusDiTPipelineOutput)
    masks = output.query_masks
    for k, (job, image) in enumerate(zip(jobs, output.images, strict=True)):
        if masks is not None:
            unit = DOWNSAMPLE * pipeline.transformer.dit.config.patch
            grid = (image.height // unit, image.width // unit)
            sheet = mask_map(masks[k], grid, pipeline.scheduler.timesteps.tolist(), image)
            write_png(sheet, job.masks(args.out), job.description)
        write_png(image, job.picture(args.out), job.description)
    return output.ffn_work


def write_summary(jobs: Sequence[Job], origin: dict[str, Any], args: argparse.Namespace) -> str:
    """Writes the list, the contact sheet and the page of all pictures. Returns a closing line."""
    out, shown = args.out, jobs[:SHOWN]
    lines = [{"file": job.picture(out).name, **job.description, **origin} for job in jobs]
    atomic_write(out / "prompts.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    images = [Image.open(job.picture(out)).convert("RGB") for job in shown]
    write_png(labelled_grid(images, [job.prompt for job in shown]), out / "grid.png")
    masks = [job.masks(out) if args.save_masks else None for job in shown]
    entries = [PageEntry(job.prompt, job.seed, job.picture(out), m) for job, m in zip(shown, masks, strict=True)]
    settings = {**origin, **{k: v for k, v in jobs[0].settings.items() if v is not None}}
    atomic_write(
        out / "index.html",
        page(
            f"{counted(len(jobs), 'picture')} from {args.run or args.model}", settings, entries, len(jobs) - len(shown)
        ),
    )
    return f"{counted(len(jobs), 'picture')} in {out}: see {out / 'grid.png'} or {out / 'index.html'}"
