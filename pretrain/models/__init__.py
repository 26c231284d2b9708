"""The backbones: torch and einops only.

Each name is imported when it is first asked for, so that the help of `python -m pretrain.models` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = ("compute_budget", "conditioning", "config", "dit", "focusdit.skip", "presets", "text")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            names = vars(import_module(f"pretrain.models.{module}"))
            if name in names:
                globals()[name] = names[name]
                return names[name]
    raise AttributeError(f"module {__name__} has no name {name}")
