"""The backbone's methods side by side: their times beside their FLOPs, each as a share of the plain DiT's.

    forward    one forward pass with each budget: FlexDiT's four densities, each number of mediators
    sampling   whole sampling runs with guidance, where each step's budget follows from its noise level
    xl         DiT-XL at 512 px with all its blocks, against FlexDiT with the published sparsity of .90 to .96
    attention  mediators' attention alone against full attention, as the tokens grow fourfold

Random weights: what is computed does not depend on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import mean

import torch

from data_prep.encoders import working_dtype
from pretrain.bench.timing import side_by_side
from pretrain.diffusion import Guidance, generate, start_noise
from pretrain.models import ComputeBudget, DiT, DiTConfig, PackedText, preset
from pretrain.models.budget_choices import default_budget
from pretrain.models.compare import METHODS
from pretrain.models.cost import count_flops, text_flops
from pretrain.models.embeddings import Rotary, rotary_positions
from pretrain.models.grids import Grid, square
from pretrain.models.mixers.flexdit import BINS
from pretrain.models.mixers.full import SelfAttention
from pretrain.models.mixers.mediators import MediatorAttention
from pretrain.schedulers import build_scheduler, set_timesteps

MODELS = {
    "dit": METHODS["baseline"],
    "flexdit": METHODS["FlexDiT"],
    "mediators": METHODS["mediators"],
    "focusdit": METHODS["FocusDiT"],
}
PARTS = ("forward", "sampling", "xl", "attention")
XL = tuple(replace(preset(name), text_width=0) for name in ("dit_xl2", "flexdit_xl2_512"))
XL_GRID = (32, 32)


@dataclass(frozen=True)
class Row:
    """One line: what is timed, and its FLOPs. The first line of a part is what the others are shares of."""

    model: str
    budget: str
    run: Callable[[], object]
    flops: float


@dataclass(frozen=True)
class Inputs:
    """Inputs of all models: latents at the middle of the noise levels, captions, and the null text."""

    latent: torch.Tensor
    timestep: torch.Tensor
    text: PackedText
    null: PackedText

    @classmethod
    def of(cls, c: DiTConfig, grid: Grid, args: argparse.Namespace) -> Inputs:
        device = torch.device(args.device)
        dtype = working_dtype(device)
        size = (args.batch, c.latent_channels, grid[0] * c.patch, grid[1] * c.patch)
        captions = [torch.randn(args.caption_tokens, c.text_width, device=device, dtype=dtype)] * args.batch
        return cls(
            torch.randn(size, device=device, dtype=dtype),
            torch.full((args.batch,), 500.0, device=device),
            PackedText.pack(captions),
            PackedText.pack([captions[0][:1]]),
        )


@torch.no_grad()
def run(args: argparse.Namespace) -> str:
    """The tables of the parts asked for."""
    depth = 8 if args.depth is None else args.depth  # 4 are too few for FlexDiT's kinds of blocks
    base = replace(preset(args.preset), depth=depth) if depth else preset(args.preset)
    configs = {name: replace(base, **MODELS[name]) for name in ["dit", *(m for m in args.models if m != "dit")]}
    device = torch.device(args.device)
    threads = f"{torch.get_num_threads()} threads, {args.rounds} rounds, {args.clock} clock"
    lines = [f"{device.type}, {working_dtype(device)}, {threads}"]
    if {"forward", "sampling"} & set(args.parts):
        lines += _whole(configs, args)
    if "xl" in args.parts and "flexdit" in args.models:
        lines += _xl(args)
    if "attention" in args.parts and "mediators" in args.models:
        lines += _attention(configs["mediators"], args)
    return "\n".join(lines)


def _whole(configs: dict[str, DiTConfig], args: argparse.Namespace) -> list[str]:
    """Tables of all models side by side: forward passes and sampling."""
    base, grid, lines = configs["dit"], (args.tokens_per_side, args.tokens_per_side), []
    shape = f"{args.preset}, width {base.width}, depth {base.depth}, {grid[0] * grid[1]} tokens, batch {args.batch}"
    models = {name: _build(c, args) for name, c in configs.items()}
    given = Inputs.of(base, grid, args)
    if "forward" in args.parts:
        rows = [row for name, model in models.items() for row in _forwards(name, model, grid, given)]
        lines += _table(f"a forward pass: {shape}, captions of {args.caption_tokens} tokens", rows, args)
    if "sampling" in args.parts:
        rows = [_sampling(name, model, grid, given, args) for name, model in models.items()]
        lines += _table(f"a sampling run of {args.steps} steps with guidance: {shape}", rows, args)
    return lines


def _build(c: DiTConfig, args: argparse.Namespace) -> DiT:
    device = torch.device(args.device)
    return DiT(c).to(device, working_dtype(device)).eval()


def _table(title: str, rows: list[Row], args: argparse.Namespace) -> list[str]:
    """The rows, and for each model with several budgets their mean: noise levels fall on each of them equally often."""
    took = side_by_side(
        {f"{r.model} {r.budget}": r.run for r in rows}, args.rounds, torch.device(args.device), args.clock
    )
    times = [(row, took[f"{row.model} {row.budget}"]) for row in rows]
    first, its_time = times[0]

    def line(name: str, seconds: float, flops: float) -> str:
        share = seconds / its_time
        ratios = f"{share:>13.2f}{flops / first.flops:>14.2f}{1 / share:>8.2f}×"
        return f"  {name:<40}{seconds * 1e3:>10.1f} ms{ratios}"

    lines = ["", title, f"  {'':<40}{'time':>13}{'of its time':>13}{'of its FLOPs':>14}{'speed':>9}"]
    for model, group in groupby(times, key=lambda pair: pair[0].model):
        each = list(group)
        lines += [line(f"{model} {row.budget}", seconds, row.flops) for row, seconds in each]
        if len(each) > 1:
            seconds, flops = mean(seconds for _, seconds in each), mean(row.flops for row, _ in each)
            lines.append(line(f"{model}, mean over the noise levels", seconds, flops))
    return lines


def _budgets(c: DiTConfig) -> dict[str, ComputeBudget]:
    """Every budget that a model has a choice of, named."""
    if c.density == "flexdit":
        return {f"at noise {i / BINS} to {(i + 1) / BINS}": ComputeBudget.of(flexdit=i) for i in range(BINS)}
    if c.attention == "mediators":
        return {f"n = {n}": ComputeBudget.of(mediators=n) for n in c.mediators.numbers}
    return {"": ComputeBudget()}


def _forwards(name: str, model: DiT, grid: Grid, given: Inputs) -> list[Row]:
    text_tokens = len(given.text.tokens_ME) / len(given.text)
    return [
        Row(
            name,
            about,
            lambda budget=budget: model(  # type: ignore[misc]
                given.latent, model.condition(given.timestep, given.text), budget=budget
            ),
            count_flops(model.config, grid, text_tokens, budget).total,
        )
        for about, budget in _budgets(model.config).items()
    ]


def _sampling(name: str, model: DiT, grid: Grid, given: Inputs, args: argparse.Namespace) -> Row:
    """A row for all sampling steps; the captions are encoded before."""
    scheduler = build_scheduler("flow", 3.0)
    set_timesteps(scheduler, args.steps, given.latent.device)
    text, null = model.encode_text(given.text), model.encode_text(given.null)
    times = model.embed_times(scheduler.timesteps)
    noise = start_noise(range(args.batch), tuple(given.latent.shape[1:])).to(given.latent.device)  # type: ignore[arg-type]

    def draw() -> object:
        set_timesteps(scheduler, args.steps, noise.device)
        return generate(model, text, null, times, noise, scheduler, Guidance(5.5), given.latent.dtype)

    c, text_tokens = model.config, (args.caption_tokens + 1) / 2
    budgets = [default_budget(c, t / 1000) for t in scheduler.timesteps.tolist()]
    flops = sum(count_flops(c, grid, text_tokens, b).total - text_flops(c, text_tokens) for b in budgets)
    return Row(name, "", draw, flops)


def _xl(args: argparse.Namespace) -> list[str]:
    dense, flexdit = XL
    device = torch.device(args.device)
    side = XL_GRID[0] * dense.patch
    latent = torch.randn(1, dense.latent_channels, side, side, device=device, dtype=working_dtype(device))
    timestep, text = torch.full((1,), 500.0, device=device), PackedText.pack([latent.new_zeros(1, 0)])
    given = Inputs(latent, timestep, text, text)
    shape = f"width {dense.width}, depth {dense.depth}, {XL_GRID[0] * XL_GRID[1]} tokens, batch 1, no text"
    models = {"DiT-XL": _build(dense, args), "FlexDiT": _build(flexdit, args)}
    rows = [row for name, model in models.items() for row in _forwards(name, model, XL_GRID, given)]
    return _table(f"FlexDiT with a sparsity of {flexdit.flexdit.sparsity} at 512 px: {shape}", rows, args)


def _attention(c: DiTConfig, args: argparse.Namespace) -> list[str]:
    """One layer at 512 and at 1024 px: how its time grows."""
    device = torch.device(args.device)
    dtype = working_dtype(device)
    full = SelfAttention(c.width, c.heads).to(device, dtype)
    through = MediatorAttention(c.width, c.heads, c.mediators.numbers).to(device, dtype)
    for parameter in through.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    kinds = {"full": None, **{f"n = {n}": n for n in c.mediators.numbers}}
    grids: tuple[Grid, Grid] = ((32, 32), (64, 64))

    def layer(n: int | None, grid: Grid) -> Callable[[], object]:
        def positions(cells: Grid | None) -> Rotary:
            return rotary_positions(c.rotary, grid, c.width // c.heads, c.position_scale, device, dtype, cells)

        x = torch.randn(args.batch, grid[0] * grid[1], c.width, device=device, dtype=dtype)
        rotary = positions(None)
        if n is None:
            return lambda: full(x, rotary)
        its = positions(square(n))
        return lambda: through(x, grid, rotary, its, n)

    def flops(n: int | None, grid: Grid) -> int:
        budget = ComputeBudget.of(mediators=n) if n else ComputeBudget()
        layer = replace(c, depth=1, text_width=0, attention="mediators" if n else "full")
        return count_flops(layer, grid, 0, budget).attention

    took = side_by_side(
        {f"{kind} {g}": layer(n, g) for g in grids for kind, n in kinds.items()}, args.rounds, device, args.clock
    )
    lines = ["", f"self-attention alone, projections included: one layer of width {c.width}, batch {args.batch}"]
    lines.append(
        f"  {'':<8}{'1024 tokens':>14}{'of full':>9}{'4096 tokens':>15}{'of full':>9}{'grows':>9}{'its FLOPs':>11}"
    )
    for kind, n in kinds.items():
        few, many = (took[f"{kind} {g}"] for g in grids)
        shares = [took[f"{kind} {g}"] / took[f"full {g}"] for g in grids]
        growth = flops(n, grids[1]) / flops(n, grids[0])
        lines.append(
            f"  {kind:<8}{few * 1e3:>11.1f} ms{shares[0]:>9.2f}{many * 1e3:>12.1f} ms{shares[1]:>9.2f}"
            f"{many / few:>8.2f}×{growth:>10.2f}×"
        )
    return lines
