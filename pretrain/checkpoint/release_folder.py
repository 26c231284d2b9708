"""The authors' released folder: its config and weights as this project's backbone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from data_prep.encoders import lay_out
from pretrain.checkpoint.export_folder import WEIGHTS, differences, read_json, tensor_shapes
from pretrain.models import DiT, DiTConfig
from pretrain.models.release import convert, layout, read_config


def load_release(folder: Path, ignore: Sequence[str] = ()) -> DiT:
    """The released folder's backbone, in the dtype of its file.

    Raises:
        ValueError: naming what is missing, unknown, of another shape, or not supported.
    """
    config = read_release_config(folder, ignore)
    with torch.device("meta"):
        model = DiT(config)
    model.load_state_dict(convert(load_file(folder / WEIGHTS), config), assign=True)
    return lay_out(model).eval()


def read_release_config(folder: Path, ignore: Sequence[str]) -> DiTConfig:
    """The backbone that the folder describes, once its weights are known to be complete."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; give the release's transformer folder")
    if not (folder / "config.json").is_file() and (folder / "transformer" / "config.json").is_file():
        raise ValueError(f"{folder} is the whole release; give its transformer folder, {folder / 'transformer'}")
    content, found = read_json(folder / "config.json"), tensor_shapes(folder)
    blocks = {name: shape[0] for name, shape in found.items() if name.endswith(".ff.net.0.proj.weight")}
    widths = [blocks[name] for name in sorted(blocks, key=lambda n: [int(d) for d in re.findall(r"\d+", n)])]
    depth = content.get("num_layers")
    try:
        # Where an FFN is missing, the comparison below says so better than its widths would.
        config = read_config(content, widths if len(widths) == depth else [], tuple(ignore))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    if problems := differences(layout(config), found):
        raise ValueError(f"{folder / WEIGHTS} is not what config.json describes: {problems}")
    return config
