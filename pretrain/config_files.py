"""Files of a config: a YAML, those that it is based on, the overrides laid over them, and the DeepSpeed JSON that goes with it.

A YAML may lie anywhere and hold only what differs from its base:

    base: stage1_256              # a stage's name, or another YAML's path, from this one's folder
    deepspeed: mine.json          # a JSON in this one's folder; or only what differs: {train_batch_size: 64}
    data: {path: $SCRATCH/shards}

Name and run directory are never those of the base. Without `deepspeed`, the base's DeepSpeed settings are taken. A run's own
`config.yaml` is read with the `ds_config.json` beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.common.paths import expand

CONFIGS = Path(__file__).parent / "configs"
DS_CONFIGS = Path(__file__).parent.parent / "ds_configs"
# The files in which a run keeps its config.
KEPT_CONFIG, KEPT_DEEPSPEED = "config.yaml", "ds_config.json"
# A field that is a mapping of the user's own names: given anew, it is replaced, where sections are merged.
MAPPING = "data.sources"

Json = dict[str, Any]


class ConfigError(ValueError):
    """The problems of a configuration, a line each, with the field's path and the mend."""


@dataclass(frozen=True)
class Layer:
    """Content of one YAML; `deepspeed` is a JSON file, or settings that differ from the base's."""

    path: Path
    content: Json
    deepspeed: Path | Json | None


@dataclass
class ConfigFiles:
    """All layers merged. `overrides` are the values that were laid over the YAMLs, by their dotted names; `deepspeed_changes`
    are laid over `deepspeed_file`; None where no file is named.
    """

    path: Path
    content: Json
    overrides: Json = field(default_factory=dict)
    deepspeed_file: Path | None = None
    deepspeed_changes: Json = field(default_factory=dict)


def known() -> list[str]:
    """The names of the configs that ship with the package."""
    return sorted(p.stem for p in CONFIGS.glob("*.yaml"))


def read_config(
    name: str, overrides: list[str], problems: list[str], upgrade: Callable[[Json], Json] = lambda content: content
) -> ConfigFiles:
    """Reads a stage's YAML by its name or path, with its bases and the overrides; adds a line to `problems` for each problem.

    Args:
        upgrade: gives the fields of a config that an older run kept their present names.

    Raises:
        ConfigError: a YAML is not there, or cannot be read.
    """
    layers = _layers(_find(name, Path()), upgrade, problems)
    top = layers[-1]
    merged = OmegaConf.create({"name": top.path.stem, "run_dir": f"runs/{top.path.stem}"})
    files = ConfigFiles(top.path, {})
    for layer in layers:
        try:
            merged = _lay_over(merged, layer.content)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise ConfigError(f"{layer.path}: {_one_line(error)}") from error
        _lay_deepspeed_over(files, layer.deepspeed)
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not (equals and key.strip()):
            problems.append(f"{word}: an override is section.key=value, without blanks")
            continue
        try:
            change = OmegaConf.to_container(OmegaConf.from_dotlist([word]))
            assert isinstance(change, dict)
            change = _expanded(change, problems)
            if "deepspeed" in change:
                _lay_deepspeed_over(files, _deepspeed(change.pop("deepspeed"), Path(), problems))
            merged = _lay_over(merged, change, replace_mapping=not key.startswith(f"{MAPPING}."))
            files.overrides |= flatten(change)
        except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
            problems.append(f"{word}: {_one_line(error)}")
    files.content = _resolved(merged, problems)
    return files


# ---- the layers ----


def _find(name: str, folder: Path) -> Path:
    """Path of a config: one that ships, by its name, or a YAML file, from a folder. Raises ConfigError."""
    try:
        name = expand(name)
    except ValueError as error:
        raise ConfigError(f"config {error}") from error
    is_file = name.endswith((".yaml", ".yml"))
    path = folder / name if is_file else CONFIGS / f"{name}.yaml"
    if path.is_file():
        return path
    if is_file:
        more = f"; did you mean the stage {path.stem}?" if path.stem in known() else ""
        raise ConfigError(f"no config file {path}{more}")
    near = [p for p in (folder / name / KEPT_CONFIG, folder / f"{name}.yaml") if p.is_file()]
    more = f"; did you mean {near[0]}?" if near else ", or give a YAML file's path"
    raise ConfigError(f"no config {name!r}; there are {', '.join(known())}{more}")


def _layers(path: Path, upgrade: Callable[[Json], Json], problems: list[str]) -> list[Layer]:
    """The YAML and all that it is based on, the deepest base first."""
    layers: list[Layer] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise ConfigError(f"{path}: its base leads back to it: {' → '.join(str(p) for p in [*seen, path])}")
        seen.append(path.resolve())
        content = read_yaml(path)
        base, deepspeed = content.pop("base", None), content.pop("deepspeed", None)
        if _is_kept(path):
            content = upgrade(content) | {"run_dir": str(path.parent)}
            deepspeed = deepspeed or KEPT_DEEPSPEED
        elif _ships(path) and base is None:
            deepspeed = path.stem
        if layers:
            content = {key: value for key, value in content.items() if key not in ("name", "run_dir")}
        content, deepspeed = _expanded(content, problems), _expanded(deepspeed, problems, "deepspeed")
        if not _ships(path):
            _find_prompts(content, path.parent)
        layers.insert(0, Layer(path, content, _deepspeed(deepspeed, path.parent, problems)))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: {base!r} must be a stage's name, or a YAML file's path")
        try:
            path = _find(base, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: base: {error}") from error


def read_yaml(path: Path) -> Json:
    """A YAML's content, with `${…}` as it stands there. Raises ConfigError where it is none, or no mapping."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text in UTF-8 ({error}); save it as UTF-8") from error
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold fields (`steps: 1000`), not a list")
    return {str(key): value for key, value in content.items()}


def _ships(path: Path) -> bool:
    """Whether a config ships with the package: its DeepSpeed JSON bears its name, or is its base's."""
    return path.parent.resolve() == CONFIGS.resolve()


def _is_kept(path: Path) -> bool:
    """Whether a run keeps its config in this file."""
    return path.name == KEPT_CONFIG and (path.parent / KEPT_DEEPSPEED).is_file()


def _find_prompts(content: Json, folder: Path) -> None:
    """Prompts that lie beside their YAML are found from anywhere."""
    preview = content.get("preview")
    if isinstance(preview, dict) and isinstance(preview.get("prompts"), str):
        beside = folder / preview["prompts"]
        if beside.is_file():
            preview["prompts"] = str(beside.absolute())


def _expanded(content: Any, problems: list[str], where: str = "") -> Any:
    """Every text of a config with `~` and variables of the environment replaced."""
    if isinstance(content, dict):
        return {k: _expanded(v, problems, f"{where}.{k}" if where else str(k)) for k, v in content.items()}
    if isinstance(content, list):
        return [_expanded(value, problems, f"{where}.{i}") for i, value in enumerate(content)]
    if not isinstance(content, str):
        return content
    try:
        return expand(content)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return content


# ---- merging ----


def _lay_over(merged: Any, change: Json, replace_mapping: bool = True) -> Any:
    """The config so far with a layer over it."""
    section, name = MAPPING.split(".")
    if replace_mapping and isinstance(change.get(section), dict) and isinstance(change[section].get(name), dict):
        OmegaConf.update(merged, MAPPING, None, force_add=True)
    return OmegaConf.merge(merged, change)


def _deepspeed(value: Any, folder: Path, problems: list[str]) -> Path | Json | None:
    """What `deepspeed:` names: a JSON file from a folder, a shipped stage's by its name, or settings that differ."""
    if value is None or isinstance(value, dict):
        return value
    if isinstance(value, str):
        return folder / value if value.endswith(".json") else DS_CONFIGS / f"{value}.json"
    problems.append(f"deepspeed: {value!r} is no section; name a JSON file, or override as deepspeed.key=value")
    return None


def _lay_deepspeed_over(files: ConfigFiles, deepspeed: Path | Json | None) -> None:
    """A file takes the place of all before it; settings are laid over them."""
    if isinstance(deepspeed, Path):
        files.deepspeed_file, files.deepspeed_changes = deepspeed, {}
    elif deepspeed:
        changes = OmegaConf.to_container(OmegaConf.merge(files.deepspeed_changes, deepspeed))
        assert isinstance(changes, dict)
        files.deepspeed_changes = {str(key): value for key, value in changes.items()}


def _resolved(merged: Any, problems: list[str]) -> Json:
    """The config with the values of other fields in place of `${section.key}`."""
    try:
        content = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        problems.append(_one_line(error))
        content = OmegaConf.to_container(merged)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Values of nested mappings by their dotted names, such as `optimizer.lr`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat
