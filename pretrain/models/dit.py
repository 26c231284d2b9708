"""The backbone: a PixArt-alpha-like diffusion transformer, and FocusDiT as two of its settings.

Letters: B images, C latent channels, N tokens, D width, M text tokens, E the text encoder's width, K blocks.

Initialisation, all in `DiT.initialise`:

| parameter                                              | value                                                     |
|--------------------------------------------------------|-----------------------------------------------------------|
| linear weights                                         | Xavier uniform                                            |
| biases, the previous mask's columns                    | 0                                                         |
| outputs of attention and FFN                           | 0: a fresh block changes nothing                          |
| scale-shift tables                                     | gates 1, the rest normal(1/√D)                            |
| query mask's time table, or its shift                  | normal(0.02), or 0                                        |
| mediators' bias tables                                 | truncated normal(0.02)                                    |
| mediators' convolution                                 | uniform(±1/3), as torch's own                             |
| FlexDiT's W1, W2                                       | 0, the identity                                           |
| query mask's last bias                                 | 2: masks start near 0.88, where their gradient still flows |

PixArt-alpha starts its gates at random, these outputs at Xavier's and its last layer at 0. With the first two, the tiny
FocusDiT's masks shut the FFNs of the first blocks (means under 0.01 within 100 steps), since what a fresh FFN adds is noise.
With the last, the tiny DiT's loss stood still for its first 150 steps; with Xavier's it fell from the start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.block import (
    Block,
    Context,
    Positions,
    RecoverBlock,
    TimeMemory,
    TokenState,
    make_blocks,
    modulate,
)
from pretrain.models.budget import Effort, depends_on_time
from pretrain.models.config import DiTConfig
from pretrain.models.embeddings import (
    PatchEmbed,
    Rotary,
    TextProjection,
    TimeEmbed,
    rotary_positions,
    sincos_positions,
)
from pretrain.models.focusdit import ffn, mask
from pretrain.models.focusdit.skip import Skip
from pretrain.models.grids import Grid, spread, square
from pretrain.models.mixers.flexdit import sparse_grid
from pretrain.models.mixers.full import CrossAttention, MeanAttention, SelfAttention
from pretrain.models.mixers.mediators import MediatorAttention, PairBias
from pretrain.models.text import PackedText, Runs, TextMemory


@dataclass(frozen=True)
class Prediction:
    """The backbone's output; `masks` is each block's query mask [B, N] with the (rows, columns) that it computed on."""

    sample_BCHW: Tensor
    masks: tuple[tuple[Tensor, Grid], ...]
    grid: Grid

    @property
    def masks_KBN(self) -> Tensor | None:
        """Each block's query mask on the grid of all tokens; None for `mask: none`."""
        if not self.masks:
            return None
        return torch.stack([spread(m_BN[..., None], grid, self.grid)[..., 0] for m_BN, grid in self.masks])


class FinalLayer(nn.Module):
    """Tokens [B, N, D] to a prediction [B, C, H, W]; shift and scale come from the time embedding itself."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.patch = config.patch
        self.scale_shift_table = nn.Parameter(torch.empty(2, config.width))
        self.proj = nn.Linear(config.width, config.patch**2 * config.latent_channels)

    def forward(self, state: TokenState, time_BD: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time_BD[:, None]).chunk(2, dim=1)
        patches = self.proj(modulate(state.x_BND, shift, scale))
        p, rows = self.patch, state.grid[0]
        return rearrange(patches, "B (H W) (p q C) -> B C (H p) (W q)", H=rows, p=p, q=p)


class DiT(nn.Module):
    """The backbone: (noisy latent, timestep, text) to the objective's prediction.

    Attributes:
        recompute: recompute each block's activations in the backward pass instead of keeping them.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        if problems := config.problems():
            raise ValueError("this model cannot be built:\n" + "\n".join(f"  {p}" for p in problems))
        self.config = config
        self.recompute = False
        D = config.width
        self.patch_embed = PatchEmbed(config.latent_channels, config.patch, D)
        self.time_embed = TimeEmbed(D)
        self.time_modulation = nn.Linear(D, 6 * D)
        self.text_projection = TextProjection(config.text_width, D) if config.text_width else None
        self.shared_expert = ffn.Vocabulary(D, config.shared_width * D, bias=False) if config.ffn == "shared" else None
        self.blocks = nn.ModuleList(make_blocks(config))
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
                nn.init.uniform_(module.weight, -1 / 3, 1 / 3)
                nn.init.zeros_(cast(Tensor, module.bias))
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                nn.init.normal_(module.scale_shift_table, std=self.config.width**-0.5)
            if isinstance(module, Block):
                with torch.no_grad():
                    module.scale_shift_table[[2, 5]] = 1.0  # gate_msa, gate_mlp
            if isinstance(module, RecoverBlock):
                nn.init.zeros_(module.from_sparse.weight)
                nn.init.eye_(module.from_dense.weight)
            elif isinstance(module, SelfAttention | CrossAttention | MeanAttention | MediatorAttention):
                nn.init.zeros_(module.out.weight)
            elif isinstance(module, PairBias):
                for table in module.parameters():
                    nn.init.trunc_normal_(table, std=0.02)
            elif isinstance(module, ffn.Vocabulary):
                nn.init.zeros_(module.value.weight)
            elif isinstance(module, mask.QueryMask):
                nn.init.constant_(module.last.linear.bias, 2.0)

    def read(self, text: PackedText) -> TextMemory:
        """Captions to what the blocks' cross-attentions see of them: once per prompt, for all sampling steps."""
        if self.text_projection is None:
            return TextMemory(((),) * len(self.blocks), len(text))
        projected = text.with_tokens(self.text_projection(text.tokens_ME))
        attentions = [cast(CrossAttention, block.cross_attention) for block in self.blocks]
        return TextMemory(tuple(attention.read(projected) for attention in attentions), len(text))

    def read_times(self, timestep_S: Tensor) -> tuple[TimeMemory, ...]:
        """Each of these timesteps to all that the backbone makes of it, for any number of images at that time."""
        time_SD, modulation_S6D = self._time(timestep_S)
        masks: list[tuple[Tensor, Tensor]] = []
        if self.config.mask != "none":
            masks = [
                b.query_mask.read_time(time_SD, timestep_S) for b in cast(list[Block], self.blocks) if b.query_mask
            ]
        levels = (timestep_S / 1000).tolist() if depends_on_time(self.config) else [0.0] * len(timestep_S)
        return tuple(
            TimeMemory(
                time_SD[i : i + 1],
                modulation_S6D[i : i + 1],
                tuple((scale[i : i + 1], shift[i : i + 1]) for scale, shift in masks) if masks else None,
                Effort.at(self.config, levels[i]),
            )
            for i in range(len(timestep_S))
        )

    def _time(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        time_BD = self.time_embed(timestep_B)
        return time_BD, self.time_modulation(F.silu(time_BD)).unflatten(-1, (6, -1))

    def forward(
        self,
        latent_BCHW: Tensor,
        timestep_B: Tensor | TimeMemory,
        text: PackedText | TextMemory,
        skip: Skip | None = None,
        keep_KBN: Tensor | None = None,
        effort: Effort | None = None,
    ) -> Prediction:
        """Predicts for latents [B, C, H, W] at timesteps [B] in 0..1000 (0 is data), each with its caption.

        Args:
            timestep_B: one for each latent, or what `read_times` made of one for all of them.
            text: the captions, or what `read` made of them.
            skip: leaves the FFN out where the query mask weighs it little.
            keep_KBN: dropout of each block's query mask while training, from `mask.draw_keep`; none by default.
            effort: mediators and density; by default those of the noise level, which must then be the same for all images
                (and is asked of the device, unless `read_times` knows it).

        Raises:
            ValueError: the latent's sides are not divisible by the patch or too small for mediators or density; latents,
                timesteps and captions differ in number; noise levels ask for different efforts; the model has no such
                effort; or there are no query masks to skip by.
        """
        timesteps = len(latent_BCHW) if isinstance(timestep_B, TimeMemory) else len(timestep_B)
        if not len(latent_BCHW) == timesteps == len(text):
            raise ValueError(f"{len(latent_BCHW)} latents, {timesteps} timesteps and {len(text)} captions do not match")
        if skip is not None and self.config.mask == "none":
            raise ValueError(
                "this model has no query masks, so no FFN can be skipped by them; leave the skip threshold out"
            )
        grid = self._grid(latent_BCHW)
        x_BND = self.patch_embed(latent_BCHW)
        if self.config.absolute == "sincos":
            scale = self.config.position_scale
            x_BND = x_BND + sincos_positions(grid, self.config.width, scale, x_BND.device, x_BND.dtype)
        times = timestep_B if isinstance(timestep_B, TimeMemory) else TimeMemory(*self._time(timestep_B))
        context = Context(
            times=times,
            timestep_B=None if isinstance(timestep_B, TimeMemory) else timestep_B,
            positions=self._positions(grid, self._effort(timestep_B, effort), x_BND),
            shared_expert=self.shared_expert,
            skip=skip,
            keep_KBN=None if keep_KBN is None else keep_KBN.to(x_BND.dtype),
        )
        seen: Iterable[PackedText | Runs]
        if isinstance(text, TextMemory):
            seen = text.blocks
        else:
            if self.text_projection is not None:
                text = text.with_tokens(self.text_projection(text.tokens_ME))
            seen = repeat(text, len(self.blocks))
        state = TokenState(x_BND, grid, x_BND.new_ones(x_BND.shape[0], x_BND.shape[1], 1))
        masks = []
        for block, its_text in zip(self.blocks, seen, strict=True):
            if self.recompute and torch.is_grad_enabled():
                state = checkpoint(block, state, context, its_text, use_reentrant=False, preserve_rng_state=False)
            else:
                state = block(state, context, its_text)
            masks.append((state.mask_BN1.squeeze(-1), state.grid))
        return Prediction(self.final(state, times.time_BD), () if self.config.mask == "none" else tuple(masks), grid)

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

    def _effort(self, timestep_B: Tensor | TimeMemory, given: Effort | None) -> Effort:
        """What is given, if it suits the model, or the default at these times."""
        if given is not None:
            return given.check(self.config)
        if not depends_on_time(self.config):
            return Effort()
        if isinstance(timestep_B, TimeMemory):
            assert timestep_B.effort is not None
            return timestep_B.effort
        return Effort.for_all(self.config, (timestep_B / 1000).tolist())

    def _positions(self, grid: Grid, effort: Effort, like: Tensor) -> Positions:
        c = self.config

        def rotary(cells: Grid | None = None) -> Rotary:
            width = c.width // c.heads
            return rotary_positions(c.rotary, grid, width, c.position_scale, like.device, like.dtype, cells)

        cells = mediators = None
        if effort.bin is not None:
            sparse = sparse_grid(grid, c.sparsity, effort.bin)
            cells = (sparse, rotary(sparse))
        if effort.mediators is not None:
            mediators = (effort.mediators, rotary(square(effort.mediators)))
        return Positions(rotary(), cells, mediators)
