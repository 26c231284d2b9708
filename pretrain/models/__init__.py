"""The backbones: torch and einops only."""

from pretrain.models.dit import DiT, DiTConfig, Prediction
from pretrain.models.presets import PRESETS, preset
from pretrain.models.text import PackedText

__all__ = ["PRESETS", "DiT", "DiTConfig", "PackedText", "Prediction", "preset"]
