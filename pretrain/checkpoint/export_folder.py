"""Checks of a folder of weights before anything is loaded: one clear line where it is not what it should be.

Headers of safetensors are read, never a pickle.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from data_prep.common.files import permit_as_umask
from pretrain.models import DiT, DiTConfig
from pretrain.models.config import upgrade_fields

WEIGHTS = "diffusion_pytorch_model.safetensors"
# The classes that an export may name, so that opening a folder never runs code that it brings along.
COMPONENTS = {
    "transformer": {(module, "FocusDiTTransformer2DModel") for module in ("pretrain.transformer", "pretrain.pipeline")},
    "vae": {("diffusers", "AutoencoderKL"), ("diffusers", "AutoencoderKLMochi")},
    "text_encoder": {("transformers", "T5EncoderModel")},
    "tokenizer": {("transformers", name) for name in ("T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast")},
    "scheduler": {
        ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        ("diffusers", "DPMSolverMultistepScheduler"),
        ("pretrain.schedulers", "FlowMatchEulerMaruyamaScheduler"),
    },
}
# Encoders that an export only names: by component the name, and the fingerprint where it is known.
References = dict[str, dict[str, str | None]]
PIPELINE_CLASS = "FocusDiTPipeline"
CUSTOM_PIPELINE = "pipeline"  # the file, without .py, that an export names for diffusers' own loading; never run here
# Each component's own description.
CONFIGS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError with one line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def has_variant(folder: Path, variant: str | None) -> bool:
    """True where a folder's weights are there in a variant, as `save_pretrained(variant="fp16")` names them."""
    patterns = (f"*.{variant}.safetensors", f"*.safetensors.index.{variant}.json")
    return variant is not None and any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def tensor_shapes(folder: Path, weights: str = WEIGHTS, variant: str | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a folder's weights, in one safetensors file or several beside an index.

    Raises:
        ValueError: they are missing, pickled, truncated or damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _weight_files(folder, weights, variant):
        path = folder / name
        if Path(name).name != name or not path.is_file():
            pickled = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
            hint = f"; {pickled[0]} is a pickle, which is never read: convert it to safetensors" if pickled else ""
            raise ValueError(f"{folder} has no {name}{hint}")
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}); copy it again") from error
    return shapes


def _weight_files(folder: Path, weights: str, variant: str | None) -> list[str]:
    """The one file, and those that an index names: of both, diffusers and transformers do not prefer the same."""
    index = folder / f"{weights}.index.json"
    if variant is not None:
        index = folder / f"{weights}.index.{variant}.json"
        weights = f"{Path(weights).stem}.{variant}.safetensors"
    if not index.is_file():
        return [weights]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: weight_map must be an object of file names; copy it again")
    return sorted({*names.values(), *([weights] if (folder / weights).is_file() else [])})


def check_transformer(folder: Path, variant: str | None = None) -> None:
    """Compares a transformer folder's weights with what its config asks for. Raises ValueError with one line."""
    path = folder / "config.json"
    if not path.is_file() and (folder / "transformer" / path.name).is_file():
        raise ValueError(f'{folder} is a whole export; give subfolder="transformer" for its transformer alone')
    config = read_json(path)
    if "backbone" not in config:
        hint = "; import the authors' release with python -m pretrain.import_release" if "use_q_mask" in config else ""
        raise ValueError(f"{path} is not of a FocusDiTTransformer2DModel: it has no backbone{hint}")
    found = tensor_shapes(folder, variant=variant)
    try:
        backbone = read_backbone(config["backbone"])
        blocks = {name.split(".")[2] for name in found if name.startswith("dit.blocks.")}
        if len(blocks) != backbone.depth:
            raise ValueError(f"backbone: depth is {backbone.depth}, but the weights have {len(blocks)} blocks")
        with torch.device("meta"):
            wanted = {f"dit.{k}": tuple(v.shape) for k, v in DiT(backbone).state_dict().items()}
    except (ValueError, RuntimeError) as error:  # torch's own for sizes beyond any memory
        raise ValueError(f"{path}: {'; '.join(line.strip() for line in str(error).splitlines())}") from error
    if problems := differences(wanted, found):
        raise ValueError(f"{folder} holds weights of another model: {problems}")


def differences(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str:
    """The tensors that are missing, unknown or of another shape, in one line; empty where none is."""
    parts = []
    if missing := sorted(wanted.keys() - found.keys()):
        parts.append("missing " + _some(missing))
    if unknown := sorted(found.keys() - wanted.keys()):
        parts.append("unknown " + _some(unknown))
    shapes = [
        f"{n} {list(found[n])} instead of {list(wanted[n])}" for n in wanted if found.get(n, wanted[n]) != wanted[n]
    ]
    if shapes:
        parts.append("another shape: " + _some(sorted(shapes)))
    return "; ".join(parts)


def _some(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_export(folder: Path, variant: str | None = None) -> References:
    """Checks an export's parts; returns the encoders that it only names. Raises ValueError with one line.

    Args:
        variant: of the weights' files, where a component has it; one has to.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no export: it has no {path.name}; {_what_it_is(folder)}")
    index = read_json(path)
    kind = index.get("_class_name")
    if kind not in (PIPELINE_CLASS, [CUSTOM_PIPELINE, PIPELINE_CLASS]):
        raise ValueError(f"{path} is of a {kind}, not of a {PIPELINE_CLASS}")
    references = index.get("references") or {}
    if not _are_references(references):
        raise ValueError(
            f"{path}: references must give name and fingerprint (null where it is not known) of text_encoder and vae, not "
            f"{references!r}"
        )
    absent = {*references, "tokenizer"} if "text_encoder" in references else {*references}
    for component, classes in COMPONENTS.items():
        named = index.get(component) or []
        allowed = [[None, None]] if component in absent else sorted(list(c) for c in classes)
        if named not in allowed:
            raise ValueError(f"{path}: {component} is {named}; expected {' or '.join(map(str, allowed))}")
        if component not in absent:
            if not (folder / component).is_dir():
                raise ValueError(f"{folder} is no whole export: {component}/ is missing; export again")
            for file in {folder / component / CONFIGS[component], *(folder / component).glob("*.json")}:
                read_json(file)
    files = {"transformer": WEIGHTS, "vae": WEIGHTS, "text_encoder": "model.safetensors"}
    variants = {part: variant if has_variant(folder / part, variant) else None for part in files}
    if variant is not None and not any(variants.values()):
        raise ValueError(f"variant: {folder} has no weights of the variant {variant}")
    check_transformer(folder / "transformer", variants["transformer"])
    for component in ("vae", "text_encoder"):
        if component not in absent:
            tensor_shapes(folder / component, files[component], variants[component])
    return references


def _what_it_is(folder: Path) -> str:
    """How a folder without an index becomes an export, in words."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "use_q_mask" in config:
        return "it is the authors' transformer: import it with python -m pretrain.import_release"
    if "backbone" in config:
        return (
            "it is a transformer alone, as earlier versions imported the authors': import it again, or export its run"
        )
    return "make one with python -m pretrain.export"


def _are_references(value: Any) -> bool:
    return isinstance(value, dict) and all(
        component in ("text_encoder", "vae")
        and isinstance(about, dict)
        and isinstance(about.get("name"), str)
        and isinstance(about.get("fingerprint", 0), str | None)
        for component, about in value.items()
    )


def read_backbone(fields: dict[str, Any]) -> DiTConfig:
    """DiTConfig from a JSON's fields. Raises ValueError for those that are unknown, missing or of another type."""
    problems = []
    try:
        fields = upgrade_fields(fields)
        config = TypeAdapter(DiTConfig).validate_json(json.dumps(fields), strict=True)
        problems = [f"{name!r}: unknown" for name in unknown_fields(fields, asdict(config))]
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))!r}: {e['msg']}" for e in error.errors()]
    if problems:
        raise ValueError(f"backbone: {'; '.join(problems)}; the fields are those of pretrain.models.DiTConfig")
    return config


def unknown_fields(fields: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """The names of fields, and of fields of sections, that are not known."""
    found = [name for name in fields if name not in known]
    for name, value in fields.items():
        if isinstance(value, dict) and isinstance(known.get(name), dict):
            found += [f"{name}.{inner}" for inner in value if inner not in known[name]]
    return found


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` if all goes well, and leaves nothing otherwise.

    Raises:
        ValueError: `out` is there already.
    """
    if out.exists():
        raise ValueError(f"{out} is there already; remove it, or choose another --out")
    writing = out.with_name(f".writing-{out.name}-{os.getpid()}")
    writing.mkdir(parents=True)
    try:
        yield writing
        for weights in writing.rglob("*.safetensors"):
            permit_as_umask(weights)
        writing.rename(out)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
