"""Models of transformers that judge: loaded whole, and named by the hashes of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from data_prep.common.files import sha256
from data_prep.encoders import require_complete


def read_model(kind: Any, folder: Path, **options: Any) -> Any:
    """A model of class `kind`, from safetensors alone and in evaluation mode.

    Raises:
        OSError: no such files.
        ValueError: files of another model, or not all of its tensors.
        ImportError: a package that it needs is missing.
    """
    model, info = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    return require_complete(model, folder, info).eval()


def identity_of(folder: Path) -> Mapping[str, Any]:
    """Library, version and the SHA-256 of each file of weights."""
    weights = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    return {"library": "transformers", "version": transformers.__version__, "weights": weights}
