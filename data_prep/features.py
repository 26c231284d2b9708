"""Frozen vision encoder: pictures to features, one vector for each 16 × 16 pixels, which training may align its tokens with.

16 pixels are a token of 2 × 2 latent pixels, as most backbones have them. The encoder sees the picture at the size at which its
own patches are these cells, as REPA does (arXiv 2410.06940): at 224 px for 256 px and DINOv2's patches of 14, unscaled for
DINOv3's of 16. Features are the outputs of its last LayerNorm, without class and register tokens.

Letters: B pictures; H, W pixels, h, w cells, F width of the features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from data_prep.encoders import FEATURE_CELL, fingerprint, lay_out, require_complete, working_dtype
from data_prep.weights import CONVERT_VISION, VISION_ENCODERS, local_folder, require_safetensors

KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")  # model_type in transformers' config.json


class VisionEncoder:
    """Frozen vision encoder, loaded from `folder`. `width` is F; `fingerprint` covers weights and the pixels' normalisation."""

    def __init__(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, **hub: Any):
        """`hub`: words for the download, as `local_folder` takes them."""
        folder = local_folder(name, VISION_ENCODERS, **hub)
        self.name, self.folder, self.device = name, folder, torch.device(device)
        mean, std = _normalisation(folder)
        model = _read_model(folder, dtype or working_dtype(device))
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(v, device=self.device).float()[:, None, None] for v in (mean, std))
        self.width: int = model.config.hidden_size
        self.fingerprint = fingerprint(model, {"class": type(model).__name__, "mean": mean, "std": std})

    @torch.no_grad()
    def start_encoding(self, pictures_B3HW: Tensor) -> Tensor:
        """Features [B, h, w, F] of pictures in −1..1, in fp16 on the host.

        Copies from a GPU may still be under way: call `encoders.wait_for` before reading them.
        """
        rows, columns = (side // FEATURE_CELL for side in pictures_B3HW.shape[2:])
        patch = self.model.config.patch_size
        pixels = pictures_B3HW.to(self.device).float()
        if patch != FEATURE_CELL:
            pixels = interpolate(pixels, (rows * patch, columns * patch), mode="bicubic", antialias=True)
        pixels = ((pixels + 1) / 2 - self.mean) / self.std
        hidden = self.model(pixel_values=pixels.to(self.model.dtype)).last_hidden_state[:, -rows * columns :]
        return rearrange(hidden, "B (h w) F -> B h w F", h=rows).half().to("cpu", non_blocking=True)


def _normalisation(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and std of the colours of pixels in 0..1, by the folder's preprocessor_config.json. Raises ValueError."""
    file = folder / "preprocessor_config.json"
    try:
        config = json.loads(file.read_text())
        mean, std = ([float(v) for v in config[key]] for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected image_mean and image_std, the normalisation of pixels ({error}); copy it from the encoder's hub"
        ) from error
    return mean, std


def _read_model(folder: Path, dtype: torch.dtype) -> Any:
    """Loads a folder's vision encoder. Raises ValueError with one line where it cannot be."""
    from transformers import AutoConfig, AutoModel

    require_safetensors(folder, CONVERT_VISION)
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind not in KINDS:
            raise ValueError(f"model_type {kind!r} is not supported; expected one of {', '.join(KINDS)}")
        model, info = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # transformers raises many kinds for damaged files
        raise ValueError(f"{folder} holds no vision encoder that can be loaded: {error}".splitlines()[0]) from error
    return lay_out(require_complete(model, folder, info))
