"""Frozen encoders: a T5 for captions and a VAE for pictures, each with a fingerprint of its weights and settings.

`TextEncoder` and `Vae` load them; `encode_captions` and `decode_latents` use models that are loaded already.

Letters: B items, L tokens, E text width, C latent channels; H, W pixels, h, w latent pixels.

Their names and where the weights are: `data_prep/weights.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.weights import CONVERT_TEXT, CONVERT_VAE, TEXT_ENCODERS, VAES, local_folder, require_safetensors

DOWNSAMPLE = 8  # pixels per latent pixel of every supported VAE, along each side
# Pixels per vector of a vision encoder's features, along each side: those of a token of 2 × 2 latent pixels.
FEATURE_CELL = 16
ALIGNMENT = 64  # bytes; torch's allocator gives it, and MKL computes equal bits for equal alignment only
CHARACTERS_PER_TOKEN = 100  # longer captions are cut before they are tokenized
TOKEN_BUDGET = 16384  # tokens that are encoded together, with padding


def fingerprint(module: nn.Module, about: dict) -> str:
    """SHA-256 of a frozen module: its description `about`, and every weight rounded to bf16.

    Weights that were loaded in fp32 and in bf16 have the same one.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).flatten().clone().view(torch.uint8).numpy())
    return digest.hexdigest()


def require_fingerprint(
    component: str, name: str, found: str, expected: str, made: str = "encoded the data set"
) -> None:
    """Raises ValueError where a frozen encoder's fingerprint is not the one that a data set or an export states.

    The message says "the `component` `name` is not the one that `made`".
    """
    if found != expected:
        raise ValueError(
            f"the {component} {name} is not the one that {made}: its fingerprint is {found[:12]}, expected "
            f"{expected[:12]}; put the same weights there"
        )


def working_dtype(device: torch.device | str) -> torch.dtype:
    """Returns the dtype that frozen and sampling models compute in: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def default_device() -> str:
    """Returns the GPU of this task among those of its node, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('SLURM_LOCALID', os.environ.get('LOCAL_RANK', 0))) % torch.cuda.device_count()}"


def tokenize(tokenizer: Any, captions: Sequence[str], token_cap: int) -> tuple[list[list[int]], dict[int, str]]:
    """Returns each caption's token ids, at most `token_cap`, and by the caption's number the text that was cut off."""
    # A caption of a megabyte would hold up the others; a token has about 4 characters.
    captions = [c[: CHARACTERS_PER_TOKEN * token_cap] for c in captions]
    whole = tokenizer(captions, add_special_tokens=True, truncation=False, verbose=False).input_ids
    # A cut caption keeps its end token.
    ids = [i if len(i) <= token_cap else i[: token_cap - 1] + i[-1:] for i in whole]
    cut = {n: tokenizer.decode(i[token_cap - 1 : -1]) for n, i in enumerate(whole) if len(i) > token_cap}
    return ids, cut


def batches_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Returns the caption numbers of each batch: of similar length, and with padding at most `budget` tokens."""
    batches: list[list[int]] = []
    longest = 0
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not batches or (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
            longest = lengths[n]
        batches[-1].append(n)
    return batches


@torch.no_grad()
def encode_tokens(
    model: nn.Module, ids: Sequence[Sequence[int]], pad: int, device: torch.device, budget: int = TOKEN_BUDGET
) -> list[Tensor]:
    """Encodes token ids to bf16 embeddings on the host, each [L, E] without padding.

    Copies from a GPU may still be under way: call `wait_for` before reading them.
    """
    texts: list[Tensor] = [torch.empty(0)] * len(ids)
    for batch in batches_by_length([len(i) for i in ids], budget):
        lengths = [len(ids[n]) for n in batch]
        ids_BL = nn.utils.rnn.pad_sequence([torch.tensor(ids[n]) for n in batch], batch_first=True, padding_value=pad)
        keep_BL = torch.arange(ids_BL.shape[1]) < torch.tensor(lengths)[:, None]
        flat_T = keep_BL.flatten().nonzero()[:, 0]  # indices of tokens; made on the host, so that no GPU is waited for
        hidden_BLE = model(to_device(ids_BL, device), attention_mask=to_device(keep_BL, device)).last_hidden_state
        packed_TE = hidden_BLE.flatten(0, 1).index_select(0, to_device(flat_T, device)).to(torch.bfloat16)
        for n, text in zip(batch, packed_TE.to("cpu", non_blocking=True).split(lengths), strict=True):
            texts[n] = text
    return texts


def encode_captions(
    tokenizer: Any, model: nn.Module, captions: Sequence[str], token_cap: int, device: torch.device
) -> tuple[list[Tensor], dict[int, str]]:
    """Encodes captions to bf16 embeddings on the host, each [L, E] without padding; also returns what `tokenize` cut off."""
    ids, cut = tokenize(tokenizer, captions, token_cap)
    texts = encode_tokens(model, ids, tokenizer.pad_token_id, device)
    wait_for(device)
    return texts, cut


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor to the device; to a GPU from pinned memory, without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def wait_for(device: torch.device) -> None:
    """Waits until all copies from the device have arrived."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def read_text_model(folder: Path, dtype: torch.dtype, variant: str | None = None) -> Any:
    """Loads a folder's T5 encoder, of its files of a `variant`. Raises ValueError with one line where it cannot be."""
    from transformers import T5EncoderModel

    require_safetensors(folder, CONVERT_TEXT)
    try:
        model, info = T5EncoderModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, variant=variant
        )
    except Exception as error:  # transformers raises many kinds for damaged files
        raise ValueError(f"{folder} holds no T5 encoder that can be loaded: {error}".splitlines()[0]) from error
    return lay_out(require_complete(model, folder, info))


def read_vae(folder: Path, dtype: torch.dtype, variant: str | None = None) -> Any:
    """Loads a folder's VAE, of its files of a `variant`. Raises ValueError with one line where it cannot be."""
    from diffusers import AutoencoderKL, AutoencoderKLMochi

    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderKLMochi": AutoencoderKLMochi}
    config_file = folder / "config.json"
    if not config_file.exists():
        raise FileNotFoundError(f"{folder} holds no VAE: {config_file.name} is missing (diffusers' layout is expected)")
    try:
        kind = json.loads(config_file.read_text())["_class_name"]
        if kind not in classes:
            raise ValueError(f"_class_name {kind!r} is not supported; expected {' or '.join(classes)}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config_file}: {error}") from error
    require_safetensors(folder, CONVERT_VAE)
    options = {"torch_dtype": dtype, "use_safetensors": True, "low_cpu_mem_usage": False, "variant": variant}
    try:
        model, info = classes[kind].from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # diffusers raises many kinds for damaged files
        raise ValueError(f"{folder} holds no {kind} that can be loaded: {error}".splitlines()[0]) from error
    return lay_out(require_complete(model, folder, info))


def require_complete(model: Any, folder: Path, info: dict[str, Any]) -> Any:
    """Returns the model. Raises ValueError where its files lack tensors, which the library fills at random."""
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} of its tensors: {', '.join(missing[:10])}; copy it again")
    return model


class TextEncoder:
    """Frozen T5 encoder, loaded from `folder`. `width` is E; `fingerprint` covers weights and tokenizer."""

    def __init__(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, **hub: Any):
        """`hub`: words for the download, as `local_folder` takes them."""
        from transformers import AutoTokenizer

        folder = local_folder(name, TEXT_ENCODERS, **hub)
        self.name, self.folder = name, folder
        self.device = torch.device(device)
        self.model = (
            read_text_model(folder, dtype or working_dtype(device)).to(self.device).eval().requires_grad_(False)
        )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no tokenizer that can be loaded: {error}".splitlines()[0]) from error
        self.width = self.model.config.d_model
        self.fingerprint = fingerprint(self.model, {"vocabulary": self.tokenizer.get_vocab()})

    @classmethod
    def of(cls, about: Mapping[str, str], device: torch.device | str, dtype: torch.dtype | None = None) -> TextEncoder:
        """The one of a data set's card. Raises ValueError where its weights are no longer those that encoded the data set."""
        encoder = cls(about["name"], device, dtype)
        require_fingerprint("text encoder", str(encoder.folder), encoder.fingerprint, about["fingerprint"])
        return encoder

    def encode(self, captions: Sequence[str], token_cap: int) -> tuple[list[Tensor], dict[int, str]]:
        """Encodes captions as `encode_captions` does."""
        return encode_captions(self.tokenizer, self.model, captions, token_cap, self.device)


def pixels_to_floats(pixels_BHW3: Tensor, device: torch.device) -> Tensor:
    """Converts 8-bit pictures on the host to [B, 3, H, W] in −1..1 on the device, in fp32."""
    return to_device(pixels_BHW3, device).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class Latents:
    """Mean and standard deviation of a posterior, both [B, C, h, w], normalised per channel."""

    mean: Tensor
    std: Tensor


def _normalisation(model: Any) -> tuple[Tensor, Tensor]:
    """Returns shift and scale, both [C, 1, 1], of the normalisation `(z − shift)·scale` in the VAE's config."""
    config = model.config
    scaling = torch.tensor(float(config.scaling_factor))
    if config.get("latents_mean") and config.get("latents_std"):
        shift, scale = torch.tensor(config.latents_mean), scaling / torch.tensor(config.latents_std)
    else:
        shift = torch.full((config.latent_channels,), float(config.get("shift_factor") or 0.0))
        scale = scaling.expand(config.latent_channels)
    return shift.float()[:, None, None], scale.float()[:, None, None]


def _has_frames(model: Any) -> bool:
    """Returns whether pictures and latents have an axis of frames, of which one is used."""
    return type(model).__name__ == "AutoencoderKLMochi"


def lay_out(model: Any) -> Any:
    """Lays a model's weights out in memory as those of a model that was never saved; returns the model.

    They are 64-byte aligned, an `AutoencoderKL`'s channels come last, and an `AutoencoderKLMochi` is made ready for pictures
    (`mochi.py`). Tensors read from safetensors lie at any multiple of 4 bytes, where some processors compute other last bits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.data) is Tensor and tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    if _has_frames(model):
        from data_prep.mochi import for_pictures

        return for_pictures(model)
    return model.to(memory_format=torch.channels_last) if type(model).__name__ == "AutoencoderKL" else model


@torch.no_grad()
def decode_latents(model: Any, latent_BChw: Tensor, device: torch.device) -> Tensor:
    """Decodes normalised latents to pictures [B, 3, H, W] in −1..1 on the host; one at a time, to bound memory."""
    shift, scale = (v.to(device) for v in _normalisation(model))
    frames, pictures = _has_frames(model), []
    for latent in latent_BChw.to(device).float():
        z = (latent / scale + shift).to(model.dtype)[None]
        decoded = model.decode(z[:, :, None] if frames else z, return_dict=False)[0]
        pictures.append((decoded[:, :, -1] if frames else decoded).float().clamp(-1, 1).cpu())
    return torch.cat(pictures)


class Vae:
    """Frozen VAE: diffusers' `AutoencoderKL`, or `AutoencoderKLMochi` with one frame.

    Latents are normalised to about zero mean and unit variance by the VAE's config: `(z − mean)·scale / std` per
    channel where its config has `latents_mean` and `latents_std`, else `(z − shift)·scale`.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, **hub: Any):
        """`hub`: words for the download, as `local_folder` takes them."""
        folder = local_folder(name, VAES, **hub)
        self.name, self.folder = name, folder
        self.device = torch.device(device)
        self.model = read_vae(folder, dtype or working_dtype(device)).to(self.device).eval().requires_grad_(False)
        self.channels: int = self.model.config.latent_channels
        self.shift, self.scale = (v.to(self.device) for v in _normalisation(self.model))
        self.fingerprint = fingerprint(self.model, {"class": type(self.model).__name__, **self.normalisation})

    @classmethod
    def of(cls, about: Mapping[str, str], device: torch.device | str, dtype: torch.dtype | None = None) -> Vae:
        """The one of a data set's card. Raises ValueError where its weights are no longer those that encoded the data set."""
        vae = cls(about["name"], device, dtype)
        require_fingerprint("VAE", str(vae.folder), vae.fingerprint, about["fingerprint"])
        return vae

    @property
    def normalisation(self) -> dict[str, list[float]]:
        """Returns `shift` and `scale` of each channel, for the data set's card."""
        return {"shift": self.shift.flatten().tolist(), "scale": self.scale.flatten().tolist()}

    def encode(self, pictures_B3HW: Tensor) -> Latents:
        """Encodes pictures in −1..1 to normalised posteriors, in fp32 on the host."""
        latents = self.start_encoding(pictures_B3HW)
        wait_for(self.device)
        return latents

    @torch.no_grad()
    def start_encoding(self, pictures_B3HW: Tensor) -> Latents:
        """Starts `encode`; copies from a GPU may still be under way: call `wait_for` before reading them."""
        frames = _has_frames(self.model)
        pictures = pictures_B3HW.to(self.device, torch.float32 if frames else self.model.dtype)
        posterior = self.model.encode(pictures[:, :, None] if frames else pictures).latent_dist
        mean, std = (v.squeeze(2) if frames else v for v in (posterior.mean, posterior.std))
        mean, std = (mean.float() - self.shift) * self.scale, std.float() * self.scale
        return Latents(mean.to("cpu", non_blocking=True), std.to("cpu", non_blocking=True))

    def decode(self, latent_BChw: Tensor) -> Tensor:
        """Decodes latents as `decode_latents` does."""
        return decode_latents(self.model, latent_BChw, self.device)
