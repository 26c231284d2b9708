"""torch.compile over the backbone: few graphs, whatever the captions' lengths, and an error where there would be too many.

torch.compile makes one graph for each combination of shapes and constants, keeps those of all blocks together, as they share
one `forward`, and beyond a limit computes in eager mode without a word. Here the limit is an error. What keeps the graphs few:

- Shapes are fixed, apart from the captions' lengths, which are marked as changing. Where captions are padded, they are padded
  to multiples of `TEXT_MULTIPLE`, always with a mask.
- Previews, whose batches are of other sizes, are drawn in eager mode.

A compute budget (FlexDiT's grid, the number of mediators) has graphs of its own, as has each FFN size of `ffn: tapered`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.distributed import torch_private
from pretrain.models import CachedConditioning, ComputeBudget, Conditioning, DiT
from pretrain.models.conditioning import BlockConditioning, KeysValues, Unpadded
from pretrain.models.dit import StepConditioning
from pretrain.models.text import TEXT_MULTIPLE

LIMIT = 64  # graphs of one function: `ffn: tapered` has 15 in training, FlexDiT 14

# No more graphs than this are compiled, whatever the captions: in training by what mixes the tokens, and in sampling.
GRAPHS = {"dit": 4, "focusdit": 6, "flexdit": 16, "mediators": 8, "sampling": 4}


def compile_for_training(model: DiT, backend: str | Callable = "inductor") -> None:
    """Compiles each block. Raises torch's FailOnRecompileLimitHit in the step that would need more than `LIMIT` graphs."""
    torch_private.forbid_falling_back(LIMIT)
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False, fullgraph=True)
    model.register_forward_pre_hook(_mark_training)


def compile_for_sampling(
    shell: torch.nn.Module, dit: DiT, how: str | None, backend: str | Callable = "inductor"
) -> None:
    """Compiles the backbone `dit` of a transformer `shell`, which is given its conditioning by that name.

    Args:
        how: `blocks`, one block for all; `graphs`, the whole backbone, replayed as CUDA graphs; None changes nothing.

    Raises:
        FailOnRecompileLimitHit: in the picture that would need more than `LIMIT` graphs.
    """
    if how is None:
        return
    torch_private.forbid_falling_back(LIMIT)
    if how == "blocks":
        for block in dit.blocks:
            block.compile(backend=backend, dynamic=False)
    else:
        mode: dict[str, Any] = {"mode": "reduce-overhead"} if backend == "inductor" else {}
        dit.compile(backend=backend, dynamic=False, **mode)
    dit.text_multiple = TEXT_MULTIPLE
    shell.register_forward_pre_hook(_mark_sampling, with_kwargs=True)


def eager_mode(compiled: bool) -> AbstractContextManager[Any]:
    """Inside, what was compiled computes in eager mode; its graphs are kept for later. Without them nothing changes."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


# ---- captions' lengths ----


@dataclass(frozen=True)
class ChangingText:
    """A conditioning whose captions' lengths are marked as changing, when a block asks for them."""

    inner: Conditioning

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def time_BD(self) -> torch.Tensor:
        return self.inner.time_BD

    def for_block(self, index: int) -> BlockConditioning:
        conditioning = self.inner.for_block(index)
        mark(conditioning.text)
        return conditioning

    def default_budget(self) -> ComputeBudget:
        return self.inner.default_budget()


def mark(text: KeysValues | Unpadded) -> None:
    """Marks the captions' lengths as changing from batch to batch."""
    if isinstance(text, Unpadded):
        for tensor in (text.keys, text.values):
            torch_private.mark_changing(tensor, 0)
        return
    for segment in text:
        assert segment.keep is not None, "captions without a mask would be compiled for themselves"
        for tensor in (segment.keys, segment.values):
            torch_private.mark_changing(tensor, 2)
        torch_private.mark_changing(segment.keep, 3)


def _mark_training(model: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    latent, conditioning, *rest = inputs
    if not isinstance(conditioning, StepConditioning):
        return inputs
    return latent, ChangingText(conditioning), *rest


def _mark_sampling(shell: torch.nn.Module, inputs: tuple[Any, ...], given: dict[str, Any]) -> None:
    conditioning = given.get("conditioning")
    if isinstance(conditioning, CachedConditioning):
        for text in conditioning.text.blocks:
            mark(text)
