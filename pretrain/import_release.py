"""The authors' released weights as this project's transformer.

    python -m pretrain.import_release --transformer FocusDiT/transformer --out models/focusdit_release

reads `config.json` and `diffusion_pytorch_model.safetensors` and writes a folder for
`FocusDiTTransformer2DModel.from_pretrained`. Every tensor is used exactly once; what is missing, unknown or of another shape
is an error that names it, as is every setting that is not supported.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from data_prep.encoders import lay_out
from pretrain.checkpoint.export_folder import WEIGHTS, differences, new_folder, read_json, tensor_shapes
from pretrain.models import DiT, DiTConfig
from pretrain.models.release import convert, layout, read_config
from pretrain.pipeline import FocusDiTTransformer2DModel


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


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Reads the authors' released transformer.")
    parser.add_argument("--transformer", type=Path, required=True, help="the released transformer's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not be there yet")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="unknown setting that may be ignored"
    )
    args = parser.parse_args(argv)
    try:
        with new_folder(args.out) as writing:
            model = load_release(args.transformer, args.ignore)
            FocusDiTTransformer2DModel.of(model).save_pretrained(writing)
    except (ValueError, OSError) as error:
        print(f"import_release: {error}", file=sys.stderr)
        return 1
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f}M parameters in {args.out}: {model.config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
