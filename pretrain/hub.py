"""Words of diffusers' `from_pretrained`, and the folder that they lead to.

Each word is passed on to whom it concerns, or refused by name: none is ignored, as diffusers ignores those that it does not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.encoders import TextEncoder, Vae, read_text_model, read_vae, require_fingerprint
from data_prep.weights import local_folder
from pretrain.checkpoint.export_folder import References, has_variant, read_backbone, read_json

# Of the download; for a local folder there is none, so that all but the revision are met as they are.
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
# Of diffusers' loading.
MODEL = (
    "torch_dtype", "variant", "device_map", "max_memory", "offload_folder", "offload_state_dict", "low_cpu_mem_usage",
    "quantization_config", "disable_mmap", "output_loading_info", "use_safetensors", "dduf_entries",
)  # fmt: skip
# On unless they are said to be off; of all other words False asks for nothing.
SWITCHES = ("low_cpu_mem_usage", "use_safetensors")
PIPELINE = tuple(word for word in MODEL if word not in ("output_loading_info", "dduf_entries"))
MENDS = {
    "dtype": "say torch_dtype",
    "device": "say device_map, or call .to(device)",
    "custom_pipeline": "this class is the pipeline",
    "trust_remote_code": "no code of a folder's own is run",
}
# The settings that diffusers has to apply to every component while it loads it.
LEFT_TO_DIFFUSERS = ("device_map", "quantization_config")

# The file by which `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` finds the pipeline.
CUSTOM_PIPELINE_SOURCE = '''\
"""This folder's pipeline, for `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` of diffusers.

Its code is in the package focusdit-pretrain; this file only says so.
"""

import importlib

try:
    module = importlib.import_module("pretrain.pipeline")
except ModuleNotFoundError as error:
    raise ImportError(
        f"this model needs the package focusdit-pretrain ({error}): install the project that trained it, "
        "`pip install .` in its checkout"
    ) from error

FocusDiTPipeline = module.FocusDiTPipeline
'''


@dataclass(frozen=True)
class Source:
    """A folder of weights, and the words for diffusers' loading. `hub`: the words for further downloads."""

    folder: Path
    words: dict[str, Any]
    hub: dict[str, Any]


def find(name: str | Path, words: Mapping[str, Any], allowed: Iterable[str]) -> Source:
    """Finds the folder that `from_pretrained(name, **words)` means; downloads it where it is not local.

    Args:
        allowed: the words for diffusers that serve here.

    Raises:
        ValueError: a word is unknown, does not serve here, or has a value that would be ignored.
        FileNotFoundError: there is no such folder, and none on the hub.
    """
    given = {
        word: value for word, value in words.items() if value is not None and (value is not False or word in SWITCHES)
    }
    hub = {word: given.pop(word) for word in HUB if word in given}
    subfolder = str(given.pop("subfolder", ""))
    for word in sorted(given.keys() - set(allowed)):
        mend = MENDS.get(word, f"the words are {', '.join((*HUB, 'subfolder', *allowed))}")
        raise ValueError(f"{word}: from_pretrained cannot follow it here; {mend}")
    if given.setdefault("use_safetensors", True) is not True:
        raise ValueError("use_safetensors: weights are read from safetensors only, since unpickling runs a file's code")
    _check_dtype(given.get("torch_dtype"), allowed)
    if "revision" in hub and Path(name).is_dir():
        raise ValueError(f"revision: {hub['revision']!r} is of a repository on the hub, but {name} is a local folder")
    folder = local_folder(str(name), {}, **hub) / subfolder
    if subfolder and not folder.is_dir():
        raise ValueError(f"subfolder: {name} has no folder {subfolder}")
    further = {word: value for word, value in hub.items() if word != "revision"}
    return Source(folder, given, further)


def _check_dtype(dtype: Any, allowed: Iterable[str]) -> None:
    """Raises ValueError for what diffusers would take for fp32, and for components that there are not."""
    if isinstance(dtype, dict) and (unknown := sorted(dtype.keys() - {*allowed, "default"})):
        raise ValueError(f"torch_dtype: there is no component {', '.join(unknown)}")
    values = dtype.values() if isinstance(dtype, dict) else () if dtype is None else (dtype,)
    if not all(isinstance(value, torch.dtype) for value in values):
        raise ValueError(
            f"torch_dtype: {dtype!r} is no torch.dtype; give torch.bfloat16, say, or one for each component"
        )


def arguments_of(pipeline: type) -> tuple[str, ...]:
    """The names of the components and settings that a pipeline can be given instead of those of its folder."""
    return tuple(name for name in inspect.signature(pipeline).parameters if name != "self")


def read_encoders(source: Source, references: References) -> dict[str, Any]:
    """An export's encoders, copied or named, unless they were given. Raises ValueError where they are not whole, or others."""
    given, found = source.words, dict[str, Any]()
    if references and (word := next((word for word in LEFT_TO_DIFFUSERS if word in given), None)):
        named = ", ".join(str(about["name"]) for about in references.values())
        raise ValueError(
            f"{word}: this export only names its encoders ({named}), which it would not reach; export copies"
        )
    for component, about in references.items():
        if component in given:
            continue
        name = str(about["name"])
        kind = TextEncoder if component == "text_encoder" else Vae
        encoder = kind(name, "cpu", _dtype(given, component), **source.hub)
        _require_width(source.folder, name, encoder)
        if about["fingerprint"] is not None:
            made = "this model was trained with"
            require_fingerprint(component, name, encoder.fingerprint, about["fingerprint"], made)
        found[component] = encoder.model
        if isinstance(encoder, TextEncoder):
            found["tokenizer"] = encoder.tokenizer
    if not given.keys() & set(LEFT_TO_DIFFUSERS):
        for component, read in (("text_encoder", read_text_model), ("vae", read_vae)):
            if component not in {*references, *given}:
                folder = source.folder / component
                variant = given.get("variant") if has_variant(folder, given.get("variant")) else None
                found[component] = read(folder, _dtype(given, component), variant).eval()
    return found


def _require_width(folder: Path, name: str, encoder: TextEncoder | Vae) -> None:
    """Raises ValueError where a named encoder has another width, or other channels, than the transformer was trained with."""
    backbone = read_backbone(read_json(folder / "transformer" / "config.json")["backbone"])
    if isinstance(encoder, TextEncoder):
        what, has, wanted = "text embeddings are {} wide", encoder.width, backbone.text_width
    else:
        what, has, wanted = "latents have {} channels", encoder.channels, backbone.latent_channels
    if has != wanted:
        raise ValueError(
            f"{name}: its {what.format(has)}, but this model was trained on {wanted}; name the encoder it had"
        )


def _dtype(words: dict[str, Any], component: str) -> torch.dtype:
    asked = words.get("torch_dtype")
    if isinstance(asked, dict):
        asked = asked.get(component, asked.get("default"))
    return asked or torch.float32
