"""The backbone in diffusers' form: a `ModelMixin` with its config, saved and loaded as diffusers' own transformers are.

Letters: B images, C latent channels, H, W latent pixels, L text tokens, E the text encoder's width, S sampling steps, K blocks,
N tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from data_prep.encoders import lay_out
from pretrain import hub
from pretrain.checkpoint.export_folder import check_transformer, read_backbone
from pretrain.models import ComputeBudget, Conditioning, DiT, PackedText, Skip, TextCache, TimeCache
from pretrain.models.block import Block


@dataclass
class FocusDiTTransformer2DModelOutput(BaseOutput):
    """The prediction [B, C, H, W], and each block's query mask [K, B, N] (None without query masks)."""

    sample: Tensor
    query_masks: Tensor | None = None


class FocusDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """The backbone in diffusers' form.

    Args:
        backbone: the fields of `pretrain.models.DiTConfig`.
    """

    _repeated_blocks: ClassVar[list[str]] = [Block.__name__]
    _no_split_modules: ClassVar[list[str]] = _repeated_blocks

    @register_to_config
    def __init__(self, backbone: dict[str, Any]):
        super().__init__()
        self.dit = DiT(read_backbone(backbone))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | float | None = None,
        encoder_attention_mask: Tensor | None = None,
        skip: Skip | None = None,
        return_dict: bool = True,
        budget: ComputeBudget | None = None,
        conditioning: Conditioning | None = None,
    ) -> FocusDiTTransformer2DModelOutput | tuple[Tensor, tuple, tuple[int, int]]:
        """Predicts for latents [B, C, H, W] at timesteps [B] (or one for all) in 0..1000.

        Args:
            encoder_hidden_states: text embeddings [B, L, E].
            encoder_attention_mask: [B, L], not 0 where there is a token; None where all are.
            skip: leaves FFNs out where the query mask weighs them little.
            return_dict: False for the fields of `Prediction` as a tuple.
            budget: the compute budget; by default that of the noise level.
            conditioning: in place of text and timestep, from `encode_text` and `embed_times`.
        """
        if conditioning is None:
            if encoder_hidden_states is None or timestep is None:
                raise ValueError("give encoder_hidden_states and timestep, or conditioning")
            timestep_B = torch.as_tensor(timestep, device=hidden_states.device).expand(len(hidden_states))
            conditioning = self.dit.condition(timestep_B, unpadded(encoder_hidden_states, encoder_attention_mask))
        prediction = self.dit(hidden_states, conditioning, skip, budget=budget)
        if not return_dict:
            return prediction.sample_BCHW, prediction.masks, prediction.grid
        return FocusDiTTransformer2DModelOutput(prediction.sample_BCHW, prediction.masks_KBN)

    @apply_forward_hook
    def encode_text(self, text: PackedText) -> TextCache:
        """Captions to all blocks' keys and values: once per prompt, for all sampling steps."""
        return self.dit.encode_text(text)

    @apply_forward_hook
    def embed_times(self, timestep_S: Tensor) -> tuple[TimeCache, ...]:
        """Timesteps to all that the backbone makes of them: once for all pictures."""
        return self.dit.embed_times(timestep_S)

    @classmethod
    def of(cls, dit: DiT) -> FocusDiTTransformer2DModel:
        """The shell around a backbone that is there already."""
        with torch.device("meta"):
            shell = cls(backbone=asdict(dit.config))
        shell.dit = dit
        return shell

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> FocusDiTTransformer2DModel:
        """diffusers' loading, from safetensors alone; `kwargs` are its words, each of which is followed or refused.

        Raises:
            ValueError: the folder's config or weights are not those of a FocusDiT, or a word cannot be followed; one line says
                what is wrong.
        """
        source = hub.find(pretrained_model_name_or_path, kwargs, hub.MODEL)
        check_transformer(source.folder, source.words.get("variant"))
        loaded = super().from_pretrained(source.folder, **source.words)
        lay_out(loaded[0] if source.words.get("output_loading_info") else loaded)
        return loaded


def unpadded(embeds_BLE: Tensor, keep_BL: Tensor | None) -> PackedText:
    """Padded text embeddings to packed ones; asks the device for the mask."""
    if keep_BL is None:
        return PackedText.pack(list(embeds_BLE))
    return PackedText.pack([row[keep.bool()] for row, keep in zip(embeds_BLE, keep_BL, strict=True)])
