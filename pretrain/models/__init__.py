"""The backbones: torch and einops only."""

from pretrain.models.budget import Effort
from pretrain.models.config import DiTConfig
from pretrain.models.dit import DiT, Prediction
from pretrain.models.focusdit.skip import Skip
from pretrain.models.presets import PRESETS, preset
from pretrain.models.text import PackedText, TextMemory

__all__ = ["PRESETS", "DiT", "DiTConfig", "Effort", "PackedText", "Prediction", "Skip", "TextMemory", "preset"]
