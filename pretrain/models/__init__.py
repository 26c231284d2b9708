"""The backbones: torch and einops only."""

from pretrain.models.compute_budget import ComputeBudget
from pretrain.models.conditioning import CachedConditioning, Conditioning, TextCache, TimeCache
from pretrain.models.config import DiTConfig
from pretrain.models.dit import DiT, Prediction
from pretrain.models.focusdit.skip import Skip
from pretrain.models.presets import PRESETS, preset
from pretrain.models.text import PackedText

__all__ = [
    "PRESETS",
    "CachedConditioning",
    "ComputeBudget",
    "Conditioning",
    "DiT",
    "DiTConfig",
    "PackedText",
    "Prediction",
    "Skip",
    "TextCache",
    "TimeCache",
    "preset",
]
