"""A checkpoint put back: a run's own as it was, or another run's, whose model may have other settings of the same backbone.

Which parameters come and go with the settings, and which are taken from others, the models say (`models/inheritance.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.checkpoint.reader import Checkpoint
from pretrain.models import DiT, DiTConfig
from pretrain.models.inheritance import derived_parameters, optional_parameters, replaced_parameters
from pretrain.models.mixers.base import DerivedParameter
from pretrain.state import RunState

if TYPE_CHECKING:  # they import DeepSpeed, which takes seconds
    from pretrain.distributed.ema import Ema
    from pretrain.distributed.engine import Engine

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ParameterMapping:
    """The origin of each parameter of a model that starts from a trained one.

    Attributes:
        sources: the trained model's parameter, by this one's.
        fresh: parameters that keep their own initialisation.
        left: parameters of the trained model that nothing takes.
        problems: what keeps this model from starting from the trained one, a line each.
    """

    sources: dict[str, str]
    fresh: list[str]
    left: list[str]
    problems: list[str]

    @property
    def identical(self) -> bool:
        """True where both models have the same parameters."""
        return not (self.fresh or self.left or self.problems) and all(a == b for a, b in self.sources.items())

    def take(self, name: str, read: Callable[[str], Tensor]) -> Tensor | None:
        """The values for a parameter, from the trained model's as `read(name)` gives them; None for a fresh one."""
        source = self.sources.get(name)
        if source is None:
            return None
        return read(source) if source == name else _derivation(name).take(read(source))

    def describe(self) -> list[str]:
        """The mapping in words, one line for each kind of parameter."""
        derived = [n for n, source in self.sources.items() if n != source]
        lines = [f"{len(self.sources) - len(derived)} of {len(self.sources) + len(self.fresh)} parameters as they were"]
        lines += [f"{kind}: {_derivation(kind).description}" for kind in _kinds(derived)]
        lines += [f"{kind}: new, from their own start" for kind in _kinds(self.fresh)]
        return lines + [f"{kind}: left behind" for kind in _kinds(self.left)]


def map_parameters(here: Shapes, there: Shapes) -> ParameterMapping:
    """Maps the parameters of a model (`here`) to those of a trained one (`there`) that it starts from.

    Args:
        here, there: the shape of each parameter by its name.
    """
    sources: dict[str, str] = {}
    fresh, problems = [], []
    for name, shape in here.items():
        if there.get(name) == shape:
            sources[name] = name
        elif name not in there and (source := _derived_source(name, shape, there)):
            sources[name] = source
        elif _is_optional(name) and (name not in there or _starts_anew(name)):
            fresh.append(name)
        else:
            problems.append(f"{name}: there {there.get(name, 'not there')}, here {shape}")
    used = set(sources.values())
    left = [name for name in there if name not in used]
    problems += [
        f"{name}: there {there[name]}, here not there"
        for name in left
        if name not in here and not _is_optional(name) and not _is_replaced(name, here)
    ]
    return ParameterMapping(sources, fresh, left, problems)


def parameter_shapes(backbone: DiTConfig) -> Shapes:
    """The shape of each parameter of a backbone; no memory is allocated for them."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in DiT(backbone).named_parameters()}


def restore_weights(checkpoint: Checkpoint, engine: Engine, ema: Ema, moments: bool) -> list[str]:
    """Takes weights and averages of a checkpoint of the same or a related model, and if asked AdamW's moments.

    An average that the checkpoint does not have starts from its `ema`.

    Returns:
        What came from where, in words; nothing where models and averages are the same.

    Raises:
        ValueError: the models are not related, or differ although the moments are asked for.
    """
    mapping = map_parameters({s.name: s.shape for s in engine.slots}, {n: s.shape for n, s in checkpoint.slots.items()})
    if mapping.problems:
        more = f"\n  and {len(mapping.problems) - 10} more" if len(mapping.problems) > 10 else ""
        lines = "\n".join(f"  {p}" for p in mapping.problems[:10])
        raise ValueError(f"{checkpoint.path} is of another model:\n{lines}{more}")
    if moments and not mapping.identical:
        raise ValueError(
            f"{checkpoint.path} is of a model with other settings, whose moments fit this one's parameters in part only; "
            "undo the change of model.* or alignment.*, or take its weights alone into a run of its own: init_from without "
            "carry_moments"
        )

    def load(kind: str, partitions: list[Tensor]) -> None:
        engine.load_partitions(
            partitions, lambda name: mapping.take(name, lambda source: checkpoint.parameter(kind, source))
        )

    load("master", engine.masters)
    there = checkpoint.weights()
    for name, partitions in ema.partitions.items():
        load(name if name in there else "ema", partitions)
    if moments:
        for kind, partitions in engine.moments().items():
            load(kind, partitions)
        engine.updates = checkpoint.run_state.updates
    engine.all_gather_weights(engine.masters)
    averages = [f"{name}: from its ema, as it has none of this name" for name in ema.partitions if name not in there]
    return averages if mapping.identical else [*mapping.describe(), *averages]


def resume(checkpoint: Checkpoint, engine: Engine, ema: Ema, data: dict[str, Any]) -> RunState:
    """Puts a run's own checkpoint back, from any number of processes into any other.

    Args:
        data: the loader's fingerprint; the checkpoint's position is valid for the same one only.

    Raises:
        ValueError: another model, or another data order.
    """
    if different := [k for k, v in data.items() if checkpoint.state["data"].get(k) != v]:
        lines = [f"  {k}: there {checkpoint.state['data'].get(k)}, now {data[k]}" for k in different]
        raise ValueError(
            f"{checkpoint.path} was made with another data order, so its position means other samples; undo the change, or "
            "start a new run with init_from:\n" + "\n".join(lines)
        )
    restore_weights(checkpoint, engine, ema, moments=True)
    return checkpoint.run_state


def _is_optional(name: str) -> bool:
    return any(part in name for part in optional_parameters)


def _starts_anew(name: str) -> bool:
    """True for an optional parameter that does so where the trained model's has another shape."""
    return any(part in name for part in replaced_parameters)


def _derivation(name: str) -> DerivedParameter:
    """The derivation of a parameter of this name from another one."""
    return next(derived for part, derived in derived_parameters.items() if part in name)


def _derived_source(name: str, shape: tuple[int, ...], there: Shapes) -> str | None:
    """The trained model's parameter that this one can be taken from, or None."""
    for part, derived in derived_parameters.items():
        source = name.replace(part, derived.source)
        if source != name and derived.fits(shape, there.get(source)):
            return source
    return None


def _is_replaced(name: str, here: Shapes) -> bool:
    """True where this model has a parameter derived from the trained model's one of this name."""
    return any(
        derived.source in name and name.replace(derived.source, part) in here
        for part, derived in derived_parameters.items()
    )


def _kinds(names: list[str]) -> list[str]:
    """Names with the blocks' numbers counted, such as blocks.*.query_mask.last.linear.bias (28)."""
    counted = Counter(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names)
    return [f"{name} ({count})" if "*" in name else name for name, count in counted.items()]
