"""CLIP of transformers: unit embeddings of pictures and captions, for the metrics that are made of them.

Letters: B pictures or captions, L tokens, E width of an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.weights import local_folder, require_safetensors
from pretrain.evaluate.metric import NotRun

if TYPE_CHECKING:
    import torch
    from PIL import Image

CONVERT = (
    'python -c "from transformers import CLIPModel, CLIPProcessor; '
    "[kind.from_pretrained('{source}').save_pretrained('{target}') for kind in (CLIPModel, CLIPProcessor)]\""
)


class Clip:
    """A CLIP in fp32.

    Args:
        source: local folder or hub name; None where none was given.
        option: the option that gives it.

    Attributes:
        identity: library, version and the SHA-256 of each file of weights.
        size: of its pictures, in pixels along each side.
        width: E.
        token_cap: tokens of a caption, with its start and end.

    Raises:
        NotRun: there is no such folder, and the hub does not give it.
        ValueError: the folder holds no CLIP, or not all of it.
    """

    def __init__(self, source: str | None, option: str, device: torch.device):
        if source is None:
            raise NotRun(f"no CLIP; give {option} FOLDER, or a name on the hub")
        try:
            folder = local_folder(source, {})
        except FileNotFoundError as error:
            raise NotRun(f"{option} {source}: {error}") from error
        self.folder, self._device = folder, device
        self._model = read_model(folder).to(device)
        self.size = int(self._model.config.vision_config.image_size)
        self.width = int(self._model.config.projection_dim)
        self.token_cap = int(self._model.config.text_config.max_position_embeddings)
        self._images = self._read("CLIPImageProcessor")
        self._tokenizer: Any = None
        from pretrain.evaluate.weights import identity_of

        self.identity: Mapping[str, Any] = identity_of(folder)

    @property
    def resize(self) -> Mapping[str, Any]:
        """How its own processor makes a picture ready."""
        names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "image_mean", "image_std")
        return {name: value for name, value in self._images.to_dict().items() if name in names}

    def pictures(self, images: Sequence[Image.Image], **processing: Any) -> torch.Tensor:
        """Embeddings [B, E] of length 1. `processing`: settings of the processor that are others than its own."""
        import torch

        pixels_BCHW = self._images(images=list(images), return_tensors="pt", **processing).pixel_values
        with torch.inference_mode():
            found_BE = self._model.get_image_features(pixel_values=pixels_BCHW.to(self._device))
        return found_BE / found_BE.norm(dim=-1, keepdim=True)

    def captions(self, captions: Sequence[str]) -> tuple[torch.Tensor, list[bool]]:
        """Embeddings [B, E] of length 1, and which captions were cut to `token_cap` tokens; their end token is kept."""
        import torch

        from data_prep.encoders import tokenize  # late: it imports torch

        if self._tokenizer is None:
            self._tokenizer = self._read("CLIPTokenizerFast")
        ids, cut = tokenize(self._tokenizer, captions, self.token_cap)
        rows = [torch.tensor(row) for row in ids]
        ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id)
        present_BL = torch.arange(ids_BL.shape[1]) < torch.tensor([[len(row)] for row in ids])
        with torch.inference_mode():
            found_BE = self._model.get_text_features(
                input_ids=ids_BL.to(self._device), attention_mask=present_BL.to(self._device)
            )
        return found_BE / found_BE.norm(dim=-1, keepdim=True), [n in cut for n in range(len(captions))]

    def _read(self, kind: str) -> Any:
        import transformers

        try:
            return getattr(transformers, kind).from_pretrained(self.folder)
        except Exception as error:  # transformers raises many kinds for missing and damaged files
            raise ValueError(f"{self.folder} holds no {kind}: {error}".splitlines()[0]) from error


def read_model(folder: Path) -> Any:
    """A folder's CLIP, in evaluation mode and fp32. Raises ValueError with one line where it cannot be had."""
    import torch
    from transformers import CLIPModel

    from pretrain.evaluate import weights

    require_safetensors(folder, CONVERT)
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "clip":
            raise ValueError(f"its config.json says model_type {kind!r}")
        return weights.read_model(CLIPModel, folder, dtype=torch.float32)
    except Exception as error:  # transformers raises many kinds for damaged files
        raise ValueError(f"{folder} holds no CLIP that can be loaded: {error}".splitlines()[0]) from error
