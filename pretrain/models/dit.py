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

from pretrain.models import ffn, mask
from pretrain.models.attention import CrossAttention, SelfAttention
from pretrain.models.block import Block, Context, TimeMemory, TokenState, modulate
from pretrain.models.config import DiTConfig
from pretrain.models.embeddings import (
    PatchEmbed,
    Rotary,
    TextProjection,
    TimeEmbed,
    rotary_positions,
    sincos_positions,
)
from pretrain.models.skip import Skip
from pretrain.models.text import PackedText, Runs, TextMemory


@dataclass(frozen=True)
class Prediction:
    """The backbone's output; `masks_KBN` is each block's query mask, None for `mask: none`."""

    sample_BCHW: Tensor
    masks_KBN: Tensor | None


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
        self.text_projection = TextProjection(config.text_width, D)
        self.shared_expert = ffn.Vocabulary(D, config.shared_width * D, bias=False) if config.ffn == "shared" else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
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
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                nn.init.normal_(module.scale_shift_table, std=self.config.width**-0.5)
            if isinstance(module, Block):
                with torch.no_grad():
                    module.scale_shift_table[[2, 5]] = 1.0  # gate_msa, gate_mlp
            elif isinstance(module, SelfAttention | CrossAttention):
                nn.init.zeros_(module.out.weight)
            elif isinstance(module, ffn.Vocabulary):
                nn.init.zeros_(module.value.weight)
            elif isinstance(module, mask.QueryMask):
                nn.init.constant_(module.last.linear.bias, 2.0)

    def read(self, text: PackedText) -> TextMemory:
        """Captions to what the blocks' cross-attentions see of them: once per prompt, for all sampling steps."""
        projected = text.with_tokens(self.text_projection(text.tokens_ME))
        return TextMemory(tuple(block.cross_attention.read(projected) for block in cast(list[Block], self.blocks)))

    def read_times(self, timestep_S: Tensor) -> tuple[TimeMemory, ...]:
        """Each of these timesteps to all that the backbone makes of it, for any number of images at that time."""
        time_SD, modulation_S6D = self._time(timestep_S)
        masks: list[tuple[Tensor, Tensor]] = []
        if self.config.mask != "none":
            masks = [
                b.query_mask.read_time(time_SD, timestep_S) for b in cast(list[Block], self.blocks) if b.query_mask
            ]
        return tuple(
            TimeMemory(
                time_SD[i : i + 1],
                modulation_S6D[i : i + 1],
                tuple((scale[i : i + 1], shift[i : i + 1]) for scale, shift in masks) if masks else None,
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
    ) -> Prediction:
        """Predicts for latents [B, C, H, W] at timesteps [B] in 0..1000 (0 is data), each with its caption.

        Args:
            timestep_B: one for each latent, or what `read_times` made of one for all of them.
            text: the captions, or what `read` made of them.
            skip: leaves the FFN out where the query mask weighs it little.
            keep_KBN: dropout of each block's query mask while training, from `mask.draw_keep`; none by default.

        Raises:
            ValueError: the latent's sides are not divisible by the patch, latents, timesteps and captions differ in number,
                or there are no query masks to skip by.
        """
        p = self.config.patch
        timesteps = len(latent_BCHW) if isinstance(timestep_B, TimeMemory) else len(timestep_B)
        if not len(latent_BCHW) == timesteps == len(text):
            raise ValueError(f"{len(latent_BCHW)} latents, {timesteps} timesteps and {len(text)} captions do not match")
        rows, rest_h = divmod(latent_BCHW.shape[-2], p)
        columns, rest_w = divmod(latent_BCHW.shape[-1], p)
        if rest_h or rest_w:
            raise ValueError(f"a latent of {tuple(latent_BCHW.shape[-2:])} is not divisible by the patch of {p}")
        if skip is not None and self.config.mask == "none":
            raise ValueError(
                "this model has no query masks, so no FFN can be skipped by them; leave the skip threshold out"
            )
        x_BND = self.patch_embed(latent_BCHW)
        if self.config.absolute == "sincos":
            scale = self.config.position_scale
            x_BND = x_BND + sincos_positions((rows, columns), self.config.width, scale, x_BND.device, x_BND.dtype)
        times = timestep_B if isinstance(timestep_B, TimeMemory) else TimeMemory(*self._time(timestep_B))
        context = Context(
            times=times,
            timestep_B=None if isinstance(timestep_B, TimeMemory) else timestep_B,
            rotary=self._positions((rows, columns), x_BND),
            shared_expert=self.shared_expert,
            skip=skip,
            keep_KBN=None if keep_KBN is None else keep_KBN.to(x_BND.dtype),
        )
        seen: Iterable[PackedText | Runs]
        if isinstance(text, PackedText):
            seen = repeat(text.with_tokens(self.text_projection(text.tokens_ME)), len(self.blocks))
        else:
            seen = text.blocks
        state = TokenState(x_BND, (rows, columns), x_BND.new_ones(x_BND.shape[0], x_BND.shape[1], 1))
        masks = []
        for block, its_text in zip(self.blocks, seen, strict=True):
            if self.recompute and torch.is_grad_enabled():
                state = checkpoint(block, state, context, its_text, use_reentrant=False, preserve_rng_state=False)
            else:
                state = block(state, context, its_text)
            masks.append(state.mask_BN1.squeeze(-1))
        masks_KBN = None if self.config.mask == "none" else torch.stack(masks)
        return Prediction(self.final(state, times.time_BD), masks_KBN)

    def _positions(self, grid: tuple[int, int], like: Tensor) -> Rotary:
        c = self.config
        return rotary_positions(c.rotary, grid, c.width // c.heads, c.position_scale, like.device, like.dtype)
