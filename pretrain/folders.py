"""What a folder of weights holds, looked at before anything is loaded: one clear line where it is not what it should be.

Headers of safetensors are read, never a pickle.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pretrain.models import DiT, DiTConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
# The classes that an export may name, so that opening a folder never runs code that it brings along.
COMPONENTS = {
    "transformer": {("pretrain.pipeline", "FocusDiTTransformer2DModel")},
    "vae": {("diffusers", "AutoencoderKL"), ("diffusers", "AutoencoderKLMochi")},
    "text_encoder": {("transformers", "T5EncoderModel")},
    "tokenizer": {("transformers", name) for name in ("T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast")},
    "scheduler": {
        ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        ("diffusers", "DPMSolverMultistepScheduler"),
    },
}


def only_safetensors(kwargs: dict[str, Any]) -> None:
    """Makes diffusers' loading read no pickles. Raises ValueError where the caller asks for them."""
    if kwargs.setdefault("use_safetensors", True) is not True:
        raise ValueError("use_safetensors: weights are read from safetensors only, since unpickling runs a file's code")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError with one line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def tensor_shapes(folder: Path, weights: str = WEIGHTS) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a folder's weights, in one safetensors file or several beside an index.

    Raises:
        ValueError: they are missing, pickled, truncated or damaged.
    """
    index = folder / f"{weights}.index.json"
    names = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else [weights]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
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


def check_transformer(folder: Path) -> None:
    """Compares a transformer folder's weights with what its config asks for. Raises ValueError with one line."""
    config = read_json(folder / "config.json")
    if "backbone" not in config:
        hint = "; import the authors' release with python -m pretrain.import_release" if "use_q_mask" in config else ""
        raise ValueError(f"{folder / 'config.json'} is not of a FocusDiTTransformer2DModel: it has no backbone{hint}")
    try:
        with torch.device("meta"):
            wanted = {
                f"dit.{k}": tuple(v.shape) for k, v in DiT(read_backbone(config["backbone"])).state_dict().items()
            }
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    problems = differences(wanted, tensor_shapes(folder))
    if problems:
        raise ValueError(f"{folder} holds weights of another model: {problems}")


def differences(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str:
    """What is missing, unknown or of another shape among named tensors, in one line; empty where nothing is."""
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


def check_export(folder: Path) -> dict[str, dict[str, str]]:
    """Checks an export's parts; returns the encoders that it only names. Raises ValueError with one line."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no export: it has no {path.name}; make one with python -m pretrain.export")
    index = read_json(path)
    if index.get("_class_name") != "FocusDiTPipeline":
        raise ValueError(f"{path} is of a {index.get('_class_name')}, not of a FocusDiTPipeline")
    references = index.get("references") or {}
    for component, classes in COMPONENTS.items():
        named = tuple(index.get(component) or ())
        if component in references or (component == "tokenizer" and "text_encoder" in references):
            continue
        if named not in classes:
            raise ValueError(
                f"{path}: {component} is {list(named)}; expected {' or '.join(str(list(c)) for c in sorted(classes))}"
            )
        if not (folder / component).is_dir():
            raise ValueError(f"{folder} is no whole export: {component}/ is missing; export again")
    check_transformer(folder / "transformer")
    for component, weights in (("vae", WEIGHTS), ("text_encoder", "model.safetensors")):
        if component not in references:
            tensor_shapes(folder / component, weights)
    return references


def read_backbone(fields: dict[str, Any]) -> DiTConfig:
    """DiTConfig from a JSON's fields. Raises ValueError for unknown or missing ones."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return DiTConfig(**values)
    except TypeError as error:
        raise ValueError(f"backbone: {error}; the fields are those of pretrain.models.DiTConfig") from error


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
        writing.rename(out)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
