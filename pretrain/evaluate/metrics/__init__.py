"""The metrics, each a file: a new one is a line here. Each is imported where it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

METRICS: dict[str, Callable[[], Any]] = {
    "shapes": lambda: import_module("pretrain.evaluate.metrics.shapes"),
}
