"""The backbone: a PixArt-alpha-like diffusion transformer, and FocusDiT as two of its settings.

Letters: B images, C latent channels, N tokens, D width, S timesteps, K blocks.

Initialisation. `DiT.initialise` sets weights and biases, then each module with an `initialise` of its own sets the rest:

| parameter                                              | value                                                     |
|--------------------------------------------------------|-----------------------------------------------------------|
| linear weights                                         | Xavier uniform                                            |
| convolutions                                           | uniform(±1/√fan-in), as torch's own                       |
| biases, the previous mask's columns                    | 0                                                         |
| outputs of attention and FFN                           | 0: a fresh block changes nothing                          |
| scale-shift tables                                     | gates 1, the rest normal(1/√D)                            |
| query mask's time table, or its shift                  | normal(0.02), or 0                                        |
| query mask's last bias                                 | 2: masks start near 0.88, where their gradient still flows |
| a token mixer's own, fusion, alignment's projection    | its file in `mixers/`, `fusion.py`, `alignment.py`        |

PixArt-alpha starts its gates at random, these outputs at Xavier's and its last layer at 0. With the first two, the tiny
FocusDiT's masks shut the FFNs of the first blocks (means under 0.01 within 100 steps), since what a fresh FFN adds is noise.
With the last, the tiny DiT's loss stood still for its first 150 steps; with Xavier's it fell from the start.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.alignment import Projection
from pretrain.models.block import Block, Shared
from pretrain.models.budget_choices import check_budget, common_budget, default_budget
from pretrain.models.compute_budget import ComputeBudget
from pretrain.models.conditioning import BlockConditioning, Conditioning, KeysValues, TextCache, TimeCache, Unpadded
from pretrain.models.config import DiTConfig
from pretrain.models.cross_attention import CrossAttention
from pretrain.models.embeddings import (
    PatchEmbed,
    Rotary,
    TextProjection,
    TimeEmbed,
    rotary_positions,
    sincos_positions,
)
from pretrain.models.focusdit import ffn
from pretrain.models.focusdit.skip import LOW, Skip
from pretrain.models.fusion import Fusion
from pretrain.models.grids import Grid, spread
from pretrain.models.mixers.base import CoarseGrid, Modulation, Positions, TokenState
from pretrain.models.routing import Route
from pretrain.models.text import PackedText


@dataclass(frozen=True)
class Prediction:
    """The backbone's output; `masks` has each block's query mask [B, N] with the (rows, columns) that it computed on.

    With token routing, a block that computes the kept tokens alone has those tokens' mask, [B, n]. `aligned_BnF` are the tokens
    of the aligned block, projected, where they are asked for.
    """

    sample_BCHW: Tensor
    masks: tuple[tuple[Tensor, Grid], ...]
    grid: Grid
    aligned_BnF: Tensor | None = None

    @property
    def masks_KBN(self) -> Tensor | None:
        """Each block's query mask on the grid of all tokens; None for `mask: none`. Not of a pass with token routing."""
        return torch.stack(self._masks()) if self.masks else None

    @torch.no_grad()
    def mask_statistics_3KB(self, dropout: float = 0.0) -> Tensor | None:
        """Mean and variance over the tokens, and share of tokens under LOW, of each block's query mask for each image, in fp32.

        With token routing, over the tokens that the block computes. None for `mask: none`.

        Args:
            dropout: the masks' dropout in this pass: tokens without a mask are left out, the others' masks taken as before it.
        """
        statistics = []
        for _, alike in groupby(self._masks(), key=lambda mask_BN: mask_BN.shape[1]):
            mask_KBN = torch.stack(list(alike)).float() * (1 - dropout)
            kept_KBN = (mask_KBN > 0).float() if dropout else torch.ones_like(mask_KBN)
            tokens_KB = kept_KBN.sum(2).clamp(min=1)
            mean_KB = mask_KBN.sum(2) / tokens_KB  # a dropped mask is 0
            variance_KB = ((mask_KBN - mean_KB[..., None]).square() * kept_KBN).sum(2) / tokens_KB
            low_KB = ((mask_KBN < LOW) * kept_KBN).sum(2) / tokens_KB
            statistics.append(torch.stack([mean_KB, variance_KB, low_KB]))
        return torch.cat(statistics, dim=1) if statistics else None

    def _masks(self) -> list[Tensor]:
        return [spread(m_BN[..., None], grid, self.grid)[..., 0] for m_BN, grid in self.masks]


@dataclass
class _Trace:
    """What the blocks of a forward pass leave beside their last state.

    Attributes:
        aligned: the block whose tokens are to be kept; None for none.
        masks: each block's query mask, with the grid that it computed on.
        tokens_BnD: those of the block `aligned`.
    """

    aligned: int | None
    masks: list[tuple[Tensor, Grid]] = field(default_factory=list)
    tokens_BnD: Tensor | None = None


@dataclass(frozen=True)
class StepConditioning:
    """One timestep and one caption for each image, made by `DiT.condition`; each block's part is made when it is reached.

    Attributes:
        text: the projected captions [M, D]; None for a backbone without text.
    """

    dit: DiT
    timestep_B: Tensor
    time_BD: Tensor
    modulation_B6D: Tensor
    text: PackedText | None

    def __len__(self) -> int:
        return len(self.timestep_B)

    def for_block(self, index: int) -> BlockConditioning:
        block, mask = self.dit.block(index), None
        if block.query_mask is not None:
            mask = block.query_mask.embed_time(self.time_BD, self.timestep_B)
        text: KeysValues | Unpadded = ()
        if block.cross_attention is not None and self.text is not None:
            text = block.cross_attention.for_training(self.text)
        return BlockConditioning(self.modulation_B6D, mask, text)

    def default_budget(self) -> ComputeBudget:
        """Asks the device for the timesteps, where a method leaves a choice. Raises ValueError where the images' differ in it."""
        config = self.dit.config
        return common_budget(config, (self.timestep_B / 1000).tolist()) if config.open_methods else ComputeBudget()


class FinalLayer(nn.Module):
    """Tokens [B, N, D] to a prediction [B, C, H, W]; shift and scale come from the time embedding itself."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.patch = config.patch
        self.scale_shift_table = nn.Parameter(torch.empty(2, config.width))
        self.proj = nn.Linear(config.width, config.patch**2 * config.latent_channels)

    def initialise(self) -> None:
        """Draws the table from normal(1/√D)."""
        nn.init.normal_(self.scale_shift_table, std=self.scale_shift_table.shape[1] ** -0.5)

    def forward(self, state: TokenState, time_BD: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time_BD[:, None]).chunk(2, dim=1)
        patches = self.proj(Modulation(shift, scale).apply(state.x_BND))
        p, rows = self.patch, state.grid[0]
        return rearrange(patches, "B (H W) (p q C) -> B C (H p) (W q)", H=rows, p=p, q=p)


class DiT(nn.Module):
    """The backbone: (noisy latent, conditioning by timestep and text) to the objective's prediction.

    Attributes:
        recompute: recompute each block's activations in the backward pass instead of keeping them.
        text_multiple: pad the captions of `encode_text` to multiples of it, for compiled code; None does not pad.
        alignment: the projection of an aligned training, which `pretrain.loss` adds; None in every other model.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        if problems := config.problems():
            raise ValueError("this model cannot be built:\n" + "\n".join(f"  {p}" for p in problems))
        self.config = config
        self.recompute = False
        self.text_multiple: int | None = None
        self.alignment: Projection | None = None
        D = config.width
        self.patch_embed = PatchEmbed(config.latent_channels, config.patch, D)
        self.time_embed = TimeEmbed(D)
        self.time_modulation = nn.Linear(D, 6 * D)
        self.text_projection = TextProjection(config.text_width, D) if config.text_width else None
        self.shared_expert = ffn.Vocabulary(D, config.shared_width * D, bias=False) if config.ffn == "shared" else None
        attention, density = config.methods
        mixers = density.mixers(attention.mixer)
        self.blocks = nn.ModuleList(Block(config, index, mixer) for index, mixer in enumerate(mixers))
        self.fusion = Fusion(D, *config.fusion) if config.fusion else None
        self.final = FinalLayer(config)
        self.initialise()

    def initialise(self) -> None:
        """Sets every parameter as the table at the file's top says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                bound = module.weight[0].numel() ** -0.5
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(cast(Tensor, module.bias))
        for module in self.modules():
            if module is not self and (initialise := getattr(module, "initialise", None)):
                initialise()

    def block(self, index: int) -> Block:
        """Block number `index`, from the bottom."""
        return cast(Block, self.blocks[index])

    @property
    def reused_parameters(self) -> list[nn.Parameter]:
        """Parameters that several blocks use: their gradient is a sum over the blocks."""
        return [] if self.shared_expert is None else list(self.shared_expert.parameters())

    @property
    def hidden_matrices(self) -> list[nn.Parameter]:
        """Matrices inside the blocks and of the shared expert, without the query masks': what Muon is for."""
        inside = [(f"{i}.{n}", m) for i, block in enumerate(self.blocks) for n, m in block.named_modules()]
        if self.shared_expert is not None:
            inside += list(self.shared_expert.named_modules())
        linear = [m for name, m in inside if isinstance(m, nn.Linear) and "query_mask" not in name]
        return [cast(nn.Parameter, m.weight) for m in linear]

    # ---- conditioning: before the forward pass ----

    def condition(self, timestep_B: Tensor, text: PackedText) -> StepConditioning:
        """A training step's conditioning: timesteps [B] in 0..1000 (0 is data), one caption each. Raises ValueError."""
        if len(timestep_B) != len(text):
            raise ValueError(f"{len(timestep_B)} timesteps and {len(text)} captions do not match")
        time_BD, modulation_B6D = self._time(timestep_B)
        projected = None
        if self.text_projection is not None:
            projected = text.with_tokens(self.text_projection(text.tokens_ME))
        return StepConditioning(self, timestep_B, time_BD, modulation_B6D, projected)

    def encode_text(self, text: PackedText) -> TextCache:
        """Encodes captions to all blocks' keys and values: once per prompt, for all sampling steps."""
        if self.text_projection is None:
            return TextCache(((),) * len(self.blocks), len(text))
        if self.text_multiple is not None:
            text = PackedText.pack(text.captions(), self.text_multiple)
        projected = text.with_tokens(self.text_projection(text.tokens_ME))
        encode = CrossAttention.by_length if self.text_multiple is None else CrossAttention.padded
        attentions = [self.block(i).cross_attention for i in range(len(self.blocks))]
        return TextCache(tuple(encode(a, projected) for a in attentions if a is not None), len(text))

    def embed_times(self, timestep_S: Tensor) -> tuple[TimeCache, ...]:
        """Embeds timesteps [S]: all that the backbone makes of each, for any number of images at that time."""
        time_SD, modulation_S6D = self._time(timestep_S)
        masks: list[tuple[Tensor, Tensor]] = [
            mask.embed_time(time_SD, timestep_S)
            for mask in (self.block(i).query_mask for i in range(len(self.blocks)))
            if mask is not None
        ]
        levels = (timestep_S / 1000).tolist() if self.config.open_methods else [0.0] * len(timestep_S)
        return tuple(
            TimeCache(
                time_SD[i : i + 1],
                modulation_S6D[i : i + 1],
                tuple((scale[i : i + 1], shift[i : i + 1]) for scale, shift in masks),
                default_budget(self.config, levels[i]),
            )
            for i in range(len(timestep_S))
        )

    def _time(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        time_BD = self.time_embed(timestep_B)
        return time_BD, self.time_modulation(F.silu(time_BD)).unflatten(-1, (6, -1))

    # ---- the forward pass ----

    def forward(
        self,
        latent_BCHW: Tensor,
        conditioning: Conditioning,
        skip: Skip | None = None,
        keep_KBN: Tensor | None = None,
        budget: ComputeBudget | None = None,
        route: Route | None = None,
        align: bool = False,
    ) -> Prediction:
        """Predicts for noisy latents [B, C, H, W].

        Args:
            conditioning: `condition`'s in training; `CachedConditioning` in sampling.
            skip: leaves the FFN out where the query mask weighs it little.
            keep_KBN: dropout of each block's query mask while training, from `mask.dropout_factors`; none by default.
            budget: the compute budget; by default that of the noise level, which must then be the same for all images.
            route: token routing, while training; by default every block computes all tokens.
            align: give the tokens of the aligned block, projected, too; for a model with `alignment`.

        Raises:
            ValueError: the latent's sides are not divisible by the patch or too small for the token mixers; latents and
                conditioning differ in number; noise levels ask for different budgets; the model has no such budget; or there
                are no query masks to skip by.
        """
        if len(latent_BCHW) != len(conditioning):
            raise ValueError(f"{len(latent_BCHW)} latents and the conditioning of {len(conditioning)} do not match")
        if skip is not None and self.config.mask == "none":
            raise ValueError(
                "this model has no query masks, so no FFN can be skipped by them; leave the skip threshold out"
            )
        grid = self._grid(latent_BCHW)
        x_BND = self.patch_embed(latent_BCHW)
        if self.config.absolute == "sincos":
            scale = self.config.position_scale
            x_BND = x_BND + sincos_positions(grid, self.config.width, scale, x_BND.device, x_BND.dtype)
        budget = conditioning.default_budget() if budget is None else check_budget(self.config, budget)
        shared = Shared(self._positions(grid, budget, x_BND), self.shared_expert, skip)
        keep_KBN = None if keep_KBN is None else keep_KBN.to(x_BND.dtype)
        state = TokenState(x_BND, grid, x_BND.new_ones(x_BND.shape[0], x_BND.shape[1], 1))
        trace = _Trace(self.alignment.block if align and self.alignment is not None else None)
        run, depth = partial(self._run_blocks, trace, conditioning), len(self.blocks)
        deep = self.fusion if route is None else route
        if deep is None:
            state = run(range(depth), state, shared, keep_KBN)
        else:
            before = run(range(deep.first), state, shared, keep_KBN)
            if route is None:
                after = run(range(deep.first, deep.last), before, shared, keep_KBN)
            else:
                routed = replace(shared, positions=route.positions(shared.positions))
                after = run(range(deep.first, deep.last), route.leave(before), routed, route.dropout(keep_KBN))
            state = run(range(deep.last, depth), self._together(before, after, route), shared, keep_KBN)
        sample_BCHW = self.final(state, conditioning.time_BD)
        aligned = None if self.alignment is None or trace.tokens_BnD is None else self.alignment(trace.tokens_BnD)
        return Prediction(sample_BCHW, () if self.config.mask == "none" else tuple(trace.masks), grid, aligned)

    def _together(self, before: TokenState, after: TokenState, route: Route | None) -> TokenState:
        """All tokens, from before and after the deep blocks, which with a route computed the kept ones alone."""
        if self.fusion is not None:
            return self.fusion(before, after, route)
        return after if route is None else route.come_back(after, before)

    def _run_blocks(
        self,
        trace: _Trace,
        conditioning: Conditioning,
        blocks: range,
        state: TokenState,
        shared: Shared,
        keep_KBN: Tensor | None,
    ) -> TokenState:
        """The state after these blocks; adds to `trace` what they leave."""
        for index in blocks:
            inputs = (index, state, conditioning, shared, None if keep_KBN is None else keep_KBN[index])
            if self.recompute and torch.is_grad_enabled():
                state = checkpoint(self._run_block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                state = self._run_block(*inputs)
            trace.masks.append((state.mask_BN1.squeeze(-1), state.grid))
            if index == trace.aligned:
                trace.tokens_BnD = state.x_BND
        return state

    def _run_block(
        self, index: int, state: TokenState, conditioning: Conditioning, shared: Shared, keep_BN: Tensor | None
    ) -> TokenState:
        return self.blocks[index](state, conditioning.for_block(index), shared, keep_BN)

    def _grid(self, latent_BCHW: Tensor) -> Grid:
        """Rows and columns of a latent's tokens. Raises ValueError where the patch does not divide it, or it is too small."""
        p = self.config.patch
        rows, rest_h = divmod(latent_BCHW.shape[-2], p)
        columns, rest_w = divmod(latent_BCHW.shape[-1], p)
        if rest_h or rest_w:
            raise ValueError(f"a latent of {tuple(latent_BCHW.shape[-2:])} is not divisible by the patch of {p}")
        if problems := self.config.grid_problems((rows, columns)):
            raise ValueError("; ".join(problems))
        return rows, columns

    def _positions(self, grid: Grid, budget: ComputeBudget, like: Tensor) -> Positions:
        """Rotary positions of all tokens, and of the coarser grids that the budget asks for."""
        c = self.config

        def rotary(cells: Grid | None = None) -> Rotary:
            width = c.width // c.heads
            return rotary_positions(c.rotary, grid, width, c.position_scale, like.device, like.dtype, cells)

        coarse = {}
        for method in c.open_methods:
            choice = budget.get(method.name)
            assert choice is not None
            cells = method.coarse_grid(grid, choice)
            coarse[method.name] = CoarseGrid(cells, rotary(cells))
        return Positions(rotary(), coarse)
