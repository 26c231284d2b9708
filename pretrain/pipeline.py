"""diffusers' way to a trained FocusDiT: the pipeline from prompts to pictures.

    from pretrain.pipeline import FocusDiTPipeline

    pipe = FocusDiTPipeline.from_pretrained("exports/stage2_512")       # made by pretrain.export
    pipe("a large red circle on the left on a white background").images[0].save("circle.png")

Letters: B images, C latent channels, H, W latent pixels, L text tokens, E the text encoder's width, S sampling steps, K blocks,
N tokens. Weights are read from safetensors files only; nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin  # noqa: F401 (earlier exports: diffusers looks for ModelMixin here)
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from data_prep.encoders import DOWNSAMPLE, lay_out
from pretrain import hub
from pretrain.checkpoint.export_folder import CUSTOM_PIPELINE, check_export
from pretrain.diffusion import FfnWork, Guidance, choose_rule, generate
from pretrain.models import ComputeBudget, Conditioning, PackedText, Prediction, Skip
from pretrain.models.mixers.mediators import Mediators
from pretrain.recipes import Recipe, recipe_of
from pretrain.transformer import FocusDiTTransformer2DModel, unpadded

logger = logging.get_logger(__name__)


@cache
def warn_of_guidance(scale: float) -> None:
    """Once for each scale, however many batches are drawn."""
    logger.warning(
        f"guidance_scale {scale:g}: this model was trained without a dropped caption (data.caption_dropout=0), so its "
        "predictions without one may mean nothing; 1 is no guidance"
    )


def mediators_of(budgets_SB: Sequence[Sequence[ComputeBudget]]) -> Tensor | None:
    """The number of mediators of each picture at each step [B, S]; None for a model without mediators."""
    numbers_SB = [[budget.get(Mediators.name) for budget in budgets] for budgets in budgets_SB]
    return None if not numbers_SB or None in numbers_SB[0] else torch.tensor(numbers_SB).T


@dataclass
class FocusDiTPipelineOutput(BaseOutput):
    """The pictures (or latents); the query masks [B, S, K, N] if asked for; what skipping left of the FFNs' work.

    `mediators_BS`: the number of mediators of each picture at each step; None for a model without mediators.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    query_masks: Tensor | None = None
    ffn_work: FfnWork | None = None
    mediators_BS: Tensor | None = None


class FocusDiTPipeline(DiffusionPipeline):
    """diffusers' pipeline from prompts to pictures.

    Args:
        tokenizer, text_encoder: the T5 that the training data was encoded with; vae: likewise.
        transformer, scheduler: what was trained, and how its objective is sampled.
        token_cap: longer prompts are cut, with a warning that shows what was cut.
        resolution: default height and width, in pixels.
        steps, guidance: default `num_inference_steps` and `guidance_scale`.
        recipe: default `recipe`.
        references: encoders that stand elsewhere, by component: name and fingerprint.
        data_fingerprint: of the card of the data set that the model was trained on.
        caption_dropout: the share of captions that training replaced by the null text; None where it is not known.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _optional_components: ClassVar[list[str]] = ["tokenizer", "text_encoder", "vae"]

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        transformer: FocusDiTTransformer2DModel,
        scheduler: Any,
        token_cap: int = 300,
        resolution: int = 512,
        steps: int = 30,
        guidance: float = 5.5,
        references: dict | None = None,
        data_fingerprint: str | None = None,
        recipe: str = "plain",
        caption_dropout: float | None = None,
    ):
        super().__init__()
        recipe_of(recipe)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=None if text_encoder is None else lay_out(text_encoder),
            vae=None if vae is None else lay_out(vae),
            transformer=transformer,
            scheduler=scheduler,
        )
        self.register_to_config(
            token_cap=token_cap,
            resolution=resolution,
            steps=steps,
            guidance=guidance,
            references=references,
            data_fingerprint=data_fingerprint,
            recipe=recipe,
            caption_dropout=caption_dropout,
        )
        self._interrupt = False

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        skip_threshold: float | None = None,
        skip_unit: str = "token",
        output_query_masks: bool = False,
        mediators: int | None = None,
        mediator_rho: Sequence[float] | None = None,
        recipe: str | None = None,
    ) -> FocusDiTPipelineOutput | tuple:
        """Draws pictures.

        Args:
            prompt: one or several; or `prompt_embeds` [B, L, E] with their mask [B, L].
            height, width: in pixels; divisible by 8 × the patch. The training's resolution by default.
            guidance_scale: of classifier-free guidance; 1 is none.
            negative_prompt: one for all, or one per prompt; the recipe's by default, which is the empty caption's in `plain`.
            generator: of the starting noise, then of the steps' where the scheduler draws any (build_scheduler's sde);
                one per picture makes each picture independent of the batch.
            latents: starting noise [B, C, H, W].
            output_type: pil | np | pt | latent.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": …}); may give other latents.
                Setting `pipeline.interrupt = True` in it ends the sampling.
            guidance_interval: the times in 0 (data) .. 1 (noise) where guidance acts (arXiv 2404.07724).
            skip_threshold: leave out FFN work where the query mask is under it; None computes all.
            skip_unit: token | layer, what the threshold judges.
            output_query_masks: give the query masks too.
            mediators: attention mediators at all steps; by default few near noise, many near data.
            mediator_rho: switch each picture to more of them as it settles; one ρ fewer than the model has numbers
                (diffusion/switching.py).
            recipe: plain | release (pretrain/recipes.py); the model's own by default.

        Raises:
            ValueError: for arguments that contradict each other or the model, with the mend.
        """
        self._check(prompt, prompt_embeds, callback_on_step_end_tensor_inputs, output_type)
        chosen, default_steps, default_scale = self.defaults(recipe)
        chosen.check(self.transformer, self.vae, self.scheduler)
        low, high = guidance_interval
        guidance = Guidance(default_scale if guidance_scale is None else guidance_scale, (low, high))
        skip = None if skip_threshold is None else Skip(skip_threshold, skip_unit)
        rule = choose_rule(self.transformer.dit.config, mediators, mediator_rho)
        device, dtype = self._execution_device, self.transformer.dtype
        text = self._text(prompt, prompt_embeds, prompt_attention_mask, num_images_per_prompt, chosen)
        null = text
        if guidance.scale != 1:
            if self.config.caption_dropout == 0:
                warn_of_guidance(guidance.scale)
            negative = chosen.negative_prompt if negative_prompt is None else negative_prompt
            embeds = negative_prompt_embeds, negative_prompt_attention_mask
            null = self._null_text(negative, *embeds, num_images_per_prompt, len(text), chosen)
        noise = self._noise(len(text), self.latent_size(height, width), generator, latents, chosen).to(device)
        steps = default_steps if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise ValueError(f"num_inference_steps: {steps} must be at least 1")
        chosen.set_timesteps(self.scheduler, steps, device)
        self._interrupt = False

        with self.progress_bar(total=steps) as bar:

            def on_step(i: int, timestep: Tensor, latent: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, i, timestep, {"latents": latent}) or {}
                    latent = changed.get("latents", latent)
                return None if self._interrupt else latent

            encoded = self.transformer.encode_text(text.to(device, dtype))
            drawn = generate(
                self._predict,
                encoded,
                encoded if null is text else self.transformer.encode_text(null.to(device, dtype)),
                self.transformer.embed_times(self.scheduler.timesteps),
                noise,
                self.scheduler,
                guidance,
                dtype,
                skip,
                output_query_masks,
                on_step,
                generator,
                rule,
            )
        images: Any = drawn.latent_BCHW
        if output_type != "latent":
            images = chosen.pictures(self.vae, drawn.latent_BCHW, device, output_type)
        self.maybe_free_model_hooks()
        output = FocusDiTPipelineOutput(images, drawn.masks_BSKN, drawn.work, mediators_of(drawn.budgets_SB))
        return output if return_dict else output.to_tuple()

    @property
    def interrupt(self) -> bool:
        """True once the sampling shall end after the current step."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    def defaults(self, recipe: str | None = None) -> tuple[Recipe, int, float]:
        """A recipe by its name, the model's own by default, and the steps and the guidance scale that are taken with it."""
        chosen = recipe_of(recipe or self.config.recipe)
        return chosen, chosen.steps or self.config.steps, chosen.guidance or self.config.guidance

    def latent_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Pixels to latent pixels. Raises ValueError for sizes that the VAE and the patch do not divide."""
        sides = [self.config.resolution if side is None else side for side in (height, width)]
        unit = DOWNSAMPLE * self.transformer.dit.config.patch
        for name, side in zip(("height", "width"), sides, strict=True):
            if side < unit or side % unit:
                near = max(unit, round(side / unit) * unit)
                raise ValueError(
                    f"{name}: {side} px must be divisible by {unit} ({DOWNSAMPLE} of the VAE × the patch of "
                    f"{unit // DOWNSAMPLE}); {near} is the nearest that is"
                )
        return sides[0] // DOWNSAMPLE, sides[1] // DOWNSAMPLE

    def encode_prompt(self, prompts: Sequence[str], recipe: Recipe | None = None) -> list[Tensor]:
        """Prompts to embeddings [L, E] in bf16 on the host, each encoded by itself: the same in every batch."""
        recipe = recipe or self.defaults()[0]
        texts = []
        if self.text_encoder is None:
            raise ValueError(
                "this pipeline has no text encoder: load it by FocusDiTPipeline.from_pretrained, which fetches those that an "
                "export only names, or give prompt_embeds"
            )
        for prompt in prompts:
            cap = self.config.token_cap
            text, cut = recipe.encode(self.tokenizer, self.text_encoder, prompt, cap, self._execution_device)
            if cut is not None:
                logger.warning(
                    f"a prompt has more than {recipe.tokens or cap} tokens; this was cut off its end: {cut!r}"
                )
            texts.append(text)
        return texts

    def _predict(
        self, latent: Tensor, conditioning: Conditioning, skip: Skip | None, *, budget: ComputeBudget | None
    ) -> Prediction:
        return Prediction(
            *self.transformer(latent, skip=skip, return_dict=False, budget=budget, conditioning=conditioning)
        )

    def _text(self, prompt: Any, embeds: Tensor | None, keep: Tensor | None, times: int, recipe: Recipe) -> PackedText:
        """The captions, each repeated `times` times."""
        if embeds is not None:
            captions = list(unpadded(embeds, keep).captions())
        else:
            captions = self.encode_prompt([prompt] if isinstance(prompt, str) else prompt, recipe)
        return PackedText.pack([caption for caption in captions for _ in range(times)])

    def _null_text(
        self, prompt: Any, embeds: Tensor | None, keep: Tensor | None, times: int, pictures: int, recipe: Recipe
    ) -> PackedText:
        """The captions that guidance leads away from: one for all pictures, or one for each."""
        null = self._text(prompt, embeds, keep, times, recipe)
        given, wanted = len(null) // times, pictures // times
        if given not in (1, wanted):
            raise ValueError(f"{given} negative prompts for {wanted} prompts: give one, or one per prompt")
        return PackedText.pack(null.captions()[:1]) if given == 1 else null

    def _noise(
        self, pictures: int, size: tuple[int, int], generator: Any, latents: Tensor | None, recipe: Recipe
    ) -> Tensor:
        shape = (pictures, self.transformer.dit.config.latent_channels, *size)
        if isinstance(generator, list) and len(generator) != pictures:
            raise ValueError(f"{len(generator)} generators for {pictures} pictures: give one, or one per picture")
        if latents is not None:
            if latents.shape != shape:
                raise ValueError(f"latents: {tuple(latents.shape)}, but {shape} are to be drawn")
            return latents.to(recipe.latent_dtype)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=recipe.latent_dtype)

    def _check(self, prompt: Any, embeds: Tensor | None, tensor_inputs: Sequence[str], output_type: str) -> None:
        if (prompt is None) == (embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        if (
            prompt is not None
            and not isinstance(prompt, str)
            and not (prompt and all(isinstance(p, str) for p in prompt))
        ):
            raise ValueError("prompt: expected a text or a list of texts with at least one")
        if self.vae is None and output_type != "latent":
            raise ValueError(
                "this pipeline has no VAE: load it by FocusDiTPipeline.from_pretrained, which fetches the one that an export "
                'only names, or ask for output_type="latent"'
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: {output_type!r} is none of pil, np, pt, latent")
        if unknown := [name for name in tensor_inputs if name not in self._callback_tensor_inputs]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: {unknown} are none of {self._callback_tensor_inputs}"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> FocusDiTPipeline:
        """diffusers' loading, from safetensors alone; encoders that the export only names are loaded from where they are.

        `kwargs` are diffusers' words (revision, token, variant, torch_dtype, …), components, and settings of the pipeline; each
        is followed or refused.

        Raises:
            ValueError, FileNotFoundError: the folder is no whole export, or a word cannot be followed; in one line.
        """
        source = hub.find(pretrained_model_name_or_path, kwargs, (*hub.PIPELINE, *hub.arguments_of(cls)))
        references = check_export(source.folder, source.words.get("variant"))
        return super().from_pretrained(source.folder, **hub.read_encoders(source, references), **source.words)

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """diffusers' saving. Raises ValueError for pickles, which would never be read again."""
        if not safe_serialization:
            raise ValueError("safe_serialization: only safetensors are written, since only they are read")
        super().save_pretrained(save_directory, safe_serialization, *args, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """diffusers' reading of `model_index.json`, without the file that it names for others: no code of a folder is run."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config["_class_name"] = cls.__name__
        return loaded

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """diffusers' writing of `model_index.json`, and the file by which `DiffusionPipeline.from_pretrained` finds this class.

        Raises:
            ValueError: it shall be pushed alone, before it is whole.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: an index alone is no pipeline; call save_pretrained(…, push_to_hub=True)")
        super().save_config(save_directory, **kwargs)
        index = Path(save_directory, self.config_name)
        content = json.loads(index.read_text(encoding="utf-8"))
        content["_class_name"] = [CUSTOM_PIPELINE, type(self).__name__]
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        Path(save_directory, f"{CUSTOM_PIPELINE}.py").write_text(hub.CUSTOM_PIPELINE_SOURCE, encoding="utf-8")
