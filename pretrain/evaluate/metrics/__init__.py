"""The metrics, each a file: a new one is a line here. Each is imported where it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

METRICS: dict[str, Callable[[], Any]] = {
    "clipscore": lambda: import_module("pretrain.evaluate.metrics.clipscore"),
    "cmmd": lambda: import_module("pretrain.evaluate.metrics.cmmd"),
    "dpg": lambda: import_module("pretrain.evaluate.metrics.dpg"),
    "fid": lambda: import_module("pretrain.evaluate.metrics.fid"),
    "geneval": lambda: import_module("pretrain.evaluate.metrics.geneval"),
    "imagereward": lambda: import_module("pretrain.evaluate.metrics.imagereward"),
    "sctf": lambda: import_module("pretrain.evaluate.metrics.sctf"),
    "shapes": lambda: import_module("pretrain.evaluate.metrics.shapes"),
}
