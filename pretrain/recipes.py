"""Recipes of drawing: all that a picture depends on beside the model, its prompt and seed, and the numbers of the sampler.

    plain      this project's: captions as they are written and without padding, noise and latents in fp32
    release    the authors' inference code, with every one of its ways

Letters: B images, C latent channels, H, W latent pixels, L text tokens, E the text encoder's width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import is_bs4_available, is_ftfy_available
from PIL import Image
from torch import Tensor

from data_prep.encoders import DOWNSAMPLE, decode_latents, encode_captions, tokenize, working_dtype
from pretrain.schedulers import set_timesteps


class Recipe:
    """This project's way to a picture, and what another one may change.

    Attributes:
        steps, guidance: in place of the model's own defaults; None keeps those.
        negative_prompt: where none is given.
        tokens: of each caption, in place of the model's cap; None keeps that.
        latent_dtype: of the starting noise, as it is drawn, and of the latents between the steps.
    """

    name = "plain"
    steps: int | None = None
    guidance: float | None = None
    negative_prompt = ""
    tokens: int | None = None
    latent_dtype = torch.float32

    def dtypes(self, device: torch.device) -> dict[str, torch.dtype]:
        """The dtype to load each component in, by its name or `default`."""
        return {"default": working_dtype(device)}

    def check(self, transformer: Any, vae: Any, scheduler: Any) -> None:
        """Raises ValueError where the components cannot draw by this recipe."""
        return

    def encode(
        self, tokenizer: Any, model: Any, prompt: str, token_cap: int, device: torch.device
    ) -> tuple[Tensor, str | None]:
        """A prompt's embeddings [L, E] in bf16 on the host, and the words that were cut off its end, if any."""
        (text,), cut = encode_captions(tokenizer, model, [prompt], token_cap, device)
        return text, cut.get(0)

    def set_timesteps(self, scheduler: Any, steps: int, device: torch.device) -> None:
        """Prepares the scheduler for `steps` evaluations."""
        set_timesteps(scheduler, steps, device)

    def pictures(self, vae: Any, latent_BCHW: Tensor, device: torch.device, output_type: str) -> Any:
        """Latents to pictures: pil | np | pt."""
        decoded = decode_latents(vae, latent_BCHW, device)
        return VaeImageProcessor(vae_scale_factor=DOWNSAMPLE).postprocess(decoded, output_type)


class ReleaseRecipe(Recipe):
    """The authors' inference code (github.com/XuejiFang/FocusDiT), line by line.

    Its choices: 30 steps, guidance 5.5, a long negative prompt; bf16 for the transformer and T5, fp32 for the VAE. Its quirks,
    which its weights were not trained with, or which no one would choose:

    - the times are shifted twice: once when diffusers' scheduler is made, once more when it is given the number of steps;
    - captions pass PixArt-alpha's cleaning, twice: at least they are lower-cased;
    - captions are padded to 512 tokens, and the padding is attended to;
    - noise is drawn in bf16, which gives other numbers than fp32 from the same seed, and latents are bf16 between the steps;
    - latents are rounded to fp16 before they are decoded, and pixels are cut off to 8 bits, not rounded.

    A sixth quirk is the model's, in `rotary: release`: angles are rounded to the tokens' precision before cosine and sine.
    """

    name = "release"
    steps = 30
    guidance = 5.5
    tokens = 512
    latent_dtype = torch.bfloat16
    negative_prompt = (
        "nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
        "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry"
    )

    def dtypes(self, device: torch.device) -> dict[str, torch.dtype]:
        return {"transformer": torch.bfloat16, "text_encoder": torch.bfloat16, "vae": torch.float32}

    def check(self, transformer: Any, vae: Any, scheduler: Any) -> None:
        wanted = self.dtypes(torch.device("cpu"))
        for name, module in (("transformer", transformer), ("vae", vae)):
            if module is not None and module.dtype != wanted[name]:
                raise ValueError(
                    f"recipe release: the {name} computes in {wanted[name]}, but was loaded in {module.dtype}; load it with "
                    "torch_dtype=RECIPES['release'].dtypes(device) of pretrain.recipes"
                )
        if type(scheduler) is not FlowMatchEulerDiscreteScheduler:
            raise ValueError(
                f"recipe release: it samples flow matching by FlowMatchEulerDiscreteScheduler, not {type(scheduler).__name__}"
            )

    def encode(
        self, tokenizer: Any, model: Any, prompt: str, token_cap: int, device: torch.device
    ) -> tuple[Tensor, str | None]:
        cleaned = clean_caption(prompt)
        _, cut = tokenize(tokenizer, [cleaned], self.tokens)
        ids = tokenizer(cleaned, padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(ids.input_ids.to(device), attention_mask=ids.attention_mask.to(device)).last_hidden_state[0]
        return hidden.to("cpu", torch.bfloat16), cut.get(0)

    def set_timesteps(self, scheduler: Any, steps: int, device: torch.device) -> None:
        scheduler.set_timesteps(steps, device=device)

    def pictures(self, vae: Any, latent_BCHW: Tensor, device: torch.device, output_type: str) -> Any:
        decoded = (decode_latents(vae, latent_BCHW.half(), device) / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return decoded
        pixels_BHW3 = decoded.permute(0, 2, 3, 1).numpy()
        return (
            pixels_BHW3 if output_type == "np" else [Image.fromarray(p) for p in (pixels_BHW3 * 255).astype(np.uint8)]
        )


def clean_caption(caption: str) -> str:
    """PixArt-alpha's cleaning, as diffusers has it. Raises ValueError where the packages that it needs are not installed."""
    if not (is_bs4_available() and is_ftfy_available()):
        raise ValueError(
            "recipe release: its cleaning of captions needs beautifulsoup4 and ftfy: "
            "pip install 'focusdit-pretrain[release]', or both by their names"
        )
    from pretrain.diffusers_private import clean_as_pixart  # late: its pipeline takes seconds

    return clean_as_pixart(caption)


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (Recipe(), ReleaseRecipe())}


def recipe_of(name: str) -> Recipe:
    """The named recipe. Raises ValueError with the known names."""
    if name not in RECIPES:
        raise ValueError(f"recipe: {name!r} is none of {', '.join(RECIPES)}")
    return RECIPES[name]
