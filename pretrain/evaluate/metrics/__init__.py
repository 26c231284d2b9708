"""The metrics, each a file: a new one is a line here. Each is imported where it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

METRICS: dict[str, Callable[[], Any]] = {
    "dpg": lambda: import_module("pretrain.evaluate.metrics.dpg"),
    "geneval": lambda: import_module("pretrain.evaluate.metrics.geneval"),
    "sctf": lambda: import_module("pretrain.evaluate.metrics.sctf"),
    "shapes": lambda: import_module("pretrain.evaluate.metrics.shapes"),
}
