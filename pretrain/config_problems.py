"""Problems of a config's fields in words: the field's path, what is wrong, and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel

from pretrain.deepspeed_config import DEEPSPEED_KEYS

# Names that other programs have for a field.
ELSEWHERE = {
    "batch_size": "deepspeed.train_batch_size (of all processes; deepspeed.train_micro_batch_size_per_gpu is one's)",
    "global_batch_size": "deepspeed.train_batch_size",
    "micro_batch_size": "deepspeed.train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "none: it follows from deepspeed.train_batch_size and the processes",
    "max_grad_norm": "deepspeed.gradient_clipping",
    "precision": "deepspeed.bf16.enabled",
    "mixed_precision": "deepspeed.bf16.enabled",
    "learning_rate": "optimizer.lr",
    "max_steps": "steps",
    "num_steps": "steps",
    "epochs": "steps (--check says how many samples an epoch has)",
    "image_size": "data.resolution",
    "num_workers": "data.workers",
    "output_dir": "run_dir",
    "out": "run_dir",
    "resume": "none: a run goes on by itself where its run_dir has a checkpoint",
    "gradient_checkpointing": "model.recompute",
}


class Choice(NamedTuple):
    """A field whose value decides whether others are read.

    Attributes:
        field: the deciding field.
        off: its values with which the others have no effect.
        on: one with which they have, to name as the mend.
        others: their names; a section's stands for all of its fields.
        made_later: a YAML may set the others and leave the choice to whoever takes the YAML.
    """

    field: str
    off: tuple[Any, ...]
    on: str
    others: tuple[str, ...]
    made_later: bool = False


CHOICES = (
    Choice(
        "model.mask",
        ("none",),
        "release",
        ("model.mask_hidden", "model.mask_previous", "model.mask_dropout"),
        made_later=True,
    ),
    Choice("model.ffn", ("uniform", "tapered"), "shared", ("model.shared_width",), made_later=True),
    Choice("model.attention", ("full",), "mediators", ("model.mediators",), made_later=True),
    Choice("model.density", ("dense",), "flexdit", ("model.flexdit",), made_later=True),
    Choice("data.validation", (None,), "0.01", ("data.validation_samples", "logging.validate_every"), made_later=True),
    Choice(
        "objective.name",
        ("epsilon",),
        "flow",
        ("objective.times", "objective.mean", "objective.std", "objective.shift", "preview.shift"),
    ),
    Choice("objective.times", ("uniform",), "logit_normal", ("objective.mean", "objective.std")),
    Choice("routing.name", ("none",), "tread", ("routing.share", "routing.first", "routing.last", "routing.until")),
    Choice("alignment.weight", (0,), "0.5", ("alignment.block", "alignment.hidden", "alignment.until")),
    Choice("optimizer.name", ("adamw",), "muon", ("optimizer.momentum",)),
)


def without_effect(values: Mapping[str, Any], given: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """Lists fields that were given and that nothing reads, as a method that they belong to was not chosen.

    A YAML's are left alone where its method was set aside by name: `optimizer.name=adamw` over a stage of Muon's is no mistake.
    An override's, too, where a number or null sets it aside, as in a sweep of `alignment.weight` that begins with 0.

    Args:
        values: all fields, by their dotted names; those of `model` as the preset completes them.
        given: those that a YAML or an override sets.
        overrides: those that an override sets.
    """
    found: dict[str, str] = {}
    for choice in CHOICES:
        if (value := values[choice.field]) not in choice.off:
            continue
        if choice.field in overrides and not isinstance(value, str):
            continue
        named = overrides if choice.made_later or choice.field in given else given
        others = tuple(f"{other}." for other in choice.others)
        for name in named:
            if named[name] is not None and f"{name}.".startswith(others):
                shown = {None: "null", 0: "0"}.get(value, value)
                mend = f"leave it out, or set {choice.field}={choice.on}"
                found.setdefault(name, f"{name}: has no effect with {choice.field}={shown}; {mend}")
    return list(found.values())


def explain(error: Any, config: type[BaseModel], renamed: Mapping[str, str]) -> str:
    """One pydantic error of a config as path, problem and mend; `renamed` has earlier paths of fields."""
    where = ".".join(str(part) for part in error["loc"])
    if where in renamed:
        return f"{where}: is now {renamed[where]}"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown field; {_hint(error['loc'], config)}"
    if error["type"] == "model_type":
        fields = ", ".join(f"{where}.{name}" for name in _section(error["loc"], config).model_fields)
        return f"{where}: is a section, not {error['input']!r}; set its fields: {fields}"
    if error["type"] == "path_type":
        return f"{where}: must be a path, not {error['input']!r}"
    if error["type"] == "missing":
        return f"{where}: missing; set it in the YAML or as {where}=value"
    return f"{where}: {error['msg']}, not {error['input']!r}"


def field_of(location: Sequence[Any], config: type[BaseModel]) -> tuple[str, ...]:
    """Path of the field that an error's location lies in: of optimizer.betas.1 the betas."""
    for length in range(1, len(location)):
        if not _is_section(_annotation(location[:length], config)):
            return tuple(location[:length])
    return tuple(location)


def _hint(location: Sequence[Any], config: type[BaseModel]) -> str:
    """Where an unknown field may be: a near name in its section, the same name in another, or the known ones."""
    *sections, name = location
    section = _section(sections, config)
    first, dot, rest = str(name).partition(".")
    if dot and first in section.model_fields:
        return f"in a YAML a section is nested: {first}: {{{rest}: …}}"
    if near := difflib.get_close_matches(name, section.model_fields, n=1):
        return f"did you mean {near[0]!r}?"
    if name in ELSEWHERE:
        return f"here it is {ELSEWHERE[name]}"
    same = [path for path in _paths(config) if path.rpartition(".")[2] == name]
    same += [f"deepspeed.{name}"] if name in DEEPSPEED_KEYS else []
    if same:
        return f"did you mean {' or '.join(same)}?"
    return f"known here: {', '.join(section.model_fields)}"


def _paths(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """Paths of all fields, those of sections included."""
    for name in section.model_fields:
        yield before + name
        inner = _annotation((name,), section)
        if _is_section(inner):
            yield from _paths(inner, f"{before}{name}.")


def _section(path: Sequence[Any], config: type[BaseModel]) -> type[BaseModel]:
    """The section of a config at a path of names."""
    section = config
    for part in path:
        section = _annotation((part,), section)
    return section


def _annotation(path: Sequence[Any], config: type[BaseModel]) -> Any:
    """The type of the field at a path of names, which may be None, too; None where there is no such field."""
    annotation: Any = config
    for part in path:
        if part not in annotation.model_fields:
            return None
        annotation = annotation.model_fields[part].annotation
        annotation = next(a for a in (*get_args(annotation), annotation) if a is not type(None))
    return annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
