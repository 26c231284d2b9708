"""The backbones: torch and einops only."""

from pretrain.models.config import DiTConfig
from pretrain.models.dit import DiT, Prediction
from pretrain.models.effort import Effort
from pretrain.models.presets import PRESETS, preset
from pretrain.models.skip import Skip
from pretrain.models.text import PackedText, TextMemory

__all__ = ["PRESETS", "DiT", "DiTConfig", "Effort", "PackedText", "Prediction", "Skip", "TextMemory", "preset"]
