"""Handover from one stage to the next: what keeps stages from running one after the other."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from pretrain.checkpoint.restore import map_parameters, parameter_shapes
from pretrain.config import Config, ConfigError, load
from pretrain.data.epoch_plan import shares_by_step
from pretrain.data.loader import check_fits
from pretrain.data.location import DataLocation, open_card
from pretrain.distributed.world import World
from pretrain.resilience.start_checks import carry_problems


@dataclass(frozen=True)
class Encoding:
    """Data set that is encoded before the stages.

    Attributes:
        data: its address.
        resolutions: that it will hold, in pixels.
        options: of the encoding, as `--features ENCODER`.
    """

    data: str
    resolutions: tuple[int, ...]
    options: tuple[str, ...] = ()

    @property
    def features(self) -> bool:
        """Whether it will hold a vision encoder's features."""
        return any(option.partition("=")[0] == "--features" for option in self.options)


def problems(stages: list[tuple[str, list[str]]], encoding: Encoding | None) -> list[str]:
    """Lists what keeps stages, each a config's name and its overrides, from running one after the other."""
    found: list[str] = []
    configs: list[Config] = []
    for name, overrides in stages:
        try:
            config, deepspeed = load(name, overrides)
        except ConfigError as error:
            first, *rest = str(error).splitlines()
            found += [f"{name}: {line.strip()}" for line in rest or [first]]
        else:
            configs.append(config)
            found += [f"{name}: {p}" for p in _data_problems(config, deepspeed["train_batch_size"], encoding)]
    if len(configs) == len(stages):
        for (name, _), (before, after) in zip(stages[1:], pairwise(configs), strict=True):
            found += [f"{name}: {p}" for p in _handover_problems(before, after)]
    return found


def _data_problems(config: Config, batch: int, encoding: Encoding | None) -> list[str]:
    """Problems where the stage's data set neither exists nor will exist in its resolution, or does not fit the stage."""
    data = config.data
    if encoding and data.path == encoding.data:
        found = []
        if data.resolution not in encoding.resolutions:
            made = " ".join(str(r) for r in encoding.resolutions)
            found.append(
                f"data.resolution: {data.resolution} is not among RESOLUTIONS ({made}), in which {data.path} is encoded"
            )
        if config.alignment.weight and not encoding.features:
            found.append(
                f"alignment.weight: {config.alignment.weight:g} needs a vision encoder's features, with which {data.path} is not "
                "encoded; add --features dinov2-base to ENCODE_OPTIONS, or set alignment.weight=0"
            )
        return found
    try:
        place = DataLocation.of(data)
        with tempfile.TemporaryDirectory() as folder:  # the cache is for the nodes' own disks
            card = open_card(replace(place, root=Path(folder)) if place.cached else place, World.alone())
        check_fits(card, config, config.model.backbone(), batch)
        shares_by_step(card.sets_with(data.resolution), data)
    except (ValueError, OSError) as error:
        return [f"data: {' '.join(str(error).split())}"]
    return []


def _handover_problems(first: Config, second: Config) -> list[str]:
    """Problems where the second stage does not start from the first one's run, or would overwrite it."""
    found = []
    runs = [Path(second.init_from), Path("runs") / second.init_from] if second.init_from else []
    if first.run_dir.resolve() not in [run.resolve() for run in runs]:
        found.append(f"init_from: {second.init_from} is not the stage before it, whose run_dir is {first.run_dir}")
    if first.run_dir.resolve() == second.run_dir.resolve():
        found.append(f"run_dir: {second.run_dir} is the stage before it, too; give each its own")
    mapping = map_parameters(*(parameter_shapes(config.model.backbone()) for config in (second, first)))
    if odd := mapping.problems:
        more = f", and {len(odd) - 1} more" if len(odd) > 1 else ""
        found.append(f"model: cannot start from the stage's before it: {odd[0]}{more}")
    else:
        found += carry_problems("the stage before it", first.model_dump(mode="json"), second, mapping.identical)
    return found
