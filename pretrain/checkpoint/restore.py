"""A checkpoint put back: a run's own as it was, or another run's, whose model may have other settings of the same backbone.

What the settings add:

    pooling blocks' `value`                        the last third of the trained `qkv`
    mediators' tables and convolution              their own start
    FlexDiT's W1 and W2                            theirs, 0 and the identity: what waited is recovered as it was
    query masks                                    theirs, near 0.88: close to no mask

What the settings leave out (a pooling block's queries and keys, mediators, query masks) is left behind.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pretrain.checkpoint.reader import Checkpoint
from pretrain.distributed.ema import Ema
from pretrain.distributed.engine import Engine
from pretrain.state import RunState

Shapes = dict[str, tuple[int, ...]]

# Parts of names that come and go with the settings.
OPTIONAL = (
    ".query_mask.",
    ".gather_bias.",
    ".spread_bias.",
    ".self_attention.local.",
    ".from_sparse.",
    ".from_dense.",
)


@dataclass(frozen=True)
class Plan:
    """Where each parameter comes from.

    Attributes:
        sources: the other model's parameter, by this one's.
        fresh: those that keep their own start.
        left: the other model's that nothing takes.
        problems: what keeps the one model from starting from the other.
    """

    sources: dict[str, str]
    fresh: list[str]
    left: list[str]
    problems: list[str]

    @property
    def same(self) -> bool:
        """Whether nothing is added, left out, or taken from elsewhere."""
        return not (self.fresh or self.left or self.problems) and all(a == b for a, b in self.sources.items())

    def report(self) -> list[str]:
        """In words, one line for each kind of parameter."""
        parts = [n for n, source in self.sources.items() if n != source]
        lines = [f"{len(self.sources) - len(parts)} of {len(self.sources) + len(self.fresh)} parameters as they were"]
        lines += [f"{kind}: the last third of qkv's" for kind in _kinds(parts)]
        lines += [f"{kind}: new, from their own start" for kind in _kinds(self.fresh)]
        return lines + [f"{kind}: left behind" for kind in _kinds(self.left)]


def plan(here: Shapes, there: Shapes) -> Plan:
    """How a model with the parameters `here` starts from one with those of `there`."""
    sources: dict[str, str] = {}
    fresh, problems = [], []
    for name, shape in here.items():
        source = name if name in there else name.replace(".self_attention.value.", ".self_attention.qkv.")
        if source != name and source in there and there[source] == (3 * shape[0], *shape[1:]):
            sources[name] = source
        elif there.get(name) == shape:
            sources[name] = name
        elif name not in there and any(part in name for part in OPTIONAL):
            fresh.append(name)
        else:
            problems.append(f"{name}: there {there.get(name, 'not there')}, here {shape}")
    used = set(sources.values())
    left = [name for name in there if name not in used]
    for name in left:
        replaced = ".self_attention.qkv." in name and name.replace(".qkv.", ".value.") in here
        if name not in here and not replaced and not any(part in name for part in OPTIONAL):
            problems.append(f"{name}: there {there[name]}, here not there")
    return Plan(sources, fresh, left, problems)


def inherit(checkpoint: Checkpoint, engine: Engine, ema: Ema, moments: bool) -> list[str]:
    """Takes weights and average, and if asked AdamW's moments, of a checkpoint of the same or a related model.

    Returns:
        What came from where, in words; nothing where the models are the same.

    Raises:
        ValueError: the models are not related, or differ although the moments are asked for.
    """
    found = plan({s.name: s.shape for s in engine.slots}, {n: s.shape for n, s in checkpoint.slots.items()})
    if found.problems:
        more = f"\n  and {len(found.problems) - 10} more" if len(found.problems) > 10 else ""
        lines = "\n".join(f"  {p}" for p in found.problems[:10])
        raise ValueError(f"{checkpoint.path} is of another model:\n{lines}{more}")
    if moments and not found.same:
        raise ValueError(
            f"{checkpoint.path} is of a model with other settings, whose moments fit this one's parameters in part only; "
            "undo the change of model.*, or take its weights alone into a run of its own: init_from without carry_moments"
        )

    def read(kind: str) -> Callable[[str], Tensor | None]:
        def of(name: str) -> Tensor | None:
            source = found.sources.get(name)
            if source is None:
                return None
            whole = checkpoint.parameter(kind, source)
            return whole if source == name else whole[2 * len(whole) // 3 :]

        return of

    engine.fill(engine.masters, read("master"))
    engine.fill(ema.shares, read("ema"))
    if moments:
        for kind, shares in engine.moments().items():
            engine.fill(shares, read(kind))
        engine.updates = checkpoint.progress.updates
    engine.publish(engine.masters)
    return [] if found.same else found.report()


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
    inherit(checkpoint, engine, ema, moments=True)
    return checkpoint.progress


def _kinds(names: list[str]) -> list[str]:
    """Names with the blocks' numbers counted, such as blocks.*.query_mask.last.linear.bias (28)."""
    counted = Counter(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names)
    return [f"{name} ({count})" if "*" in name else name for name, count in counted.items()]
