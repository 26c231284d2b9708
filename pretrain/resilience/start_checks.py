"""What a start goes on from, looked at before anything is built: the run's own checkpoint, or another run's (init_from).

A run goes on as what it was: what changes the meaning of its weights is refused, and what may change (learning rate, steps,
logging) is listed in the log, old → new.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from pretrain.checkpoint import reader as checkpoint
from pretrain.checkpoint.reader import Checkpoint, DamagedCheckpoint
from pretrain.checkpoint.restore import map_parameters, parameter_shapes
from pretrain.config import AlignmentSection, Config, upgrade
from pretrain.models import DiTConfig
from pretrain.models.alignment import PREFIX

# Of a backbone: what is drawn while training only, and may change.
TRAINING_ONLY = ("mask_dropout",)


def start_problems(config: Config, data: dict[str, Any] | None) -> list[str]:
    """Lists what keeps a run from going on from its own newest checkpoint or, without one, from starting from `init_from`.

    Args:
        data: what is known of the loader's fingerprint; None where the data set cannot be trained on.
    """
    for path in checkpoint.newest_first(config.run_dir / checkpoint.FOLDER):
        try:
            return _resume_problems(Checkpoint(path), config, data)
        except DamagedCheckpoint:  # the start takes the one before, and says so
            continue
        except ValueError as error:
            return [f"run_dir: {error}"]
    return _init_problems(config) if config.init_from else []


def _resume_problems(own: Checkpoint, config: Config, data: dict[str, Any] | None) -> list[str]:
    there = own.state["config"]
    found = []
    if changed := meaning_changes(there, config):
        found.append(
            f"run_dir: {own.path} was trained with other settings, by which its weights mean something else; undo the change, "
            "or start another run_dir with init_from:\n" + "\n".join(f"  {line}" for line in changed)
        )
    if different_optimizer := _optimizer_change(there, config):
        found.append(
            f"run_dir: {own.path} holds another optimizer's moments; undo the change, or start another run_dir with init_from: "
            f"{different_optimizer}"
        )
    if different_alignment := _alignment_change(there, config):
        found.append(
            f"run_dir: {own.path} was trained with another alignment; undo the change (alignment.until ends an alignment), or "
            f"start another run_dir with init_from: {different_alignment}"
        )
    if data is not None and (different := [k for k, v in data.items() if own.state["data"].get(k) != v]):
        lines = [f"  {k}: there {own.state['data'].get(k)}, now {data[k]}" for k in different]
        found.append(
            f"run_dir: {own.path} was made with another data order, so its position means other samples; undo the change, or "
            "start a new run with init_from:\n" + "\n".join(lines)
        )
    if own.run_state.step > config.steps:
        found.append(
            f"steps: {config.steps} lies behind step {own.run_state.step}, which {config.run_dir} has done; give more steps, "
            "or another run_dir"
        )
    return found


def _init_problems(config: Config) -> list[str]:
    """Problems of a start from another run's weights."""
    assert config.init_from is not None
    try:
        run = checkpoint.find_run(config.init_from)
        other = checkpoint.newest(run)
    except (ValueError, OSError) as error:
        return [f"init_from: {error}"]
    if other is None:
        return [f"init_from: {run} has no complete checkpoint yet; train it first"]
    shapes = {name: slot.shape for name, slot in other.slots.items() if not name.startswith(PREFIX)}
    mapping = map_parameters(parameter_shapes(config.model.backbone()), shapes)
    different = model_differences(other.state["config"], config)
    if mapping.problems:
        lines = different or mapping.problems[:10]
        return [f"init_from: {other.path} is of another model:\n" + "\n".join(f"  {line}" for line in lines)]
    return carry_problems(str(other.path), other.state["config"], config, mapping.identical)


def carry_problems(where: str, there: dict[str, Any], config: Config, identical: bool) -> list[str]:
    """Why another run's moments are not those of this one's parameters, where the config carries them.

    Args:
        where: that run, for the message; `there`: its config.
        identical: whether the backbones' parameters are the same ones.
    """
    if not config.carry_moments:
        return []
    if not identical:
        return [
            f"carry_moments: {where} is of a model with other settings, whose moments fit this one's parameters in part "
            "only; leave carry_moments out:\n" + "\n".join(f"  {line}" for line in model_differences(there, config))
        ]
    if different_optimizer := _optimizer_change(there, config):
        return [
            f"carry_moments: {where} holds another optimizer's moments; leave carry_moments out: {different_optimizer}"
        ]
    if different_alignment := _alignment_change(there, config):
        return [
            f"carry_moments: {where} was trained with another alignment; leave carry_moments out: {different_alignment}"
        ]
    return []


def _optimizer_change(there: dict[str, Any], config: Config) -> str | None:
    """The optimizer's name, where a checkpoint's config has another one."""
    before, now = there.get("optimizer", {}).get("name", "adamw"), config.optimizer.name
    return None if before == now else f"optimizer.name: there {before}, here {now}"


def _alignment_change(there: dict[str, Any], config: Config) -> str | None:
    """Where only one of a checkpoint's config and this one has an alignment, or its projection is another."""
    backbone = config.model.backbone()
    before = AlignmentSection.model_validate(there.get("alignment") or {}).build(backbone)
    now = config.alignment.build(backbone)
    if before is None or now is None:
        words = {False: "with alignment", True: "without (alignment.weight=0)"}
        return None if before is now else f"alignment: there {words[before is None]}, here {words[now is None]}"
    pairs = {name: (getattr(before, name), getattr(now, name)) for name in ("block", "hidden")}
    found = [f"alignment.{name}: there {old}, here {new}" for name, (old, new) in pairs.items() if old != new]
    return ", ".join(found) or None


def meaning_changes(there: dict[str, Any], config: Config) -> list[str]:
    """The settings that decide what weights mean, where a checkpoint's config (`there`) has other ones; a line each."""
    found = model_differences(there, config)
    before, now = there.get("objective", {}).get("name", "flow"), config.objective.name
    return found + ([f"objective.name: there {before}, here {now}"] if before != now else [])


def model_differences(there: dict[str, Any], config: Config) -> list[str]:
    """The settings of the backbone in which a checkpoint's config differs, a line each, the presets' names first."""
    section = type(config.model)
    try:
        before = section.model_validate(upgrade(there)["model"])
        old, new = _settings(before.backbone()), _settings(config.model.backbone())
    except (
        ValidationError,
        ValueError,
        KeyError,
    ):  # of a version whose settings are not known: its shapes are compared
        return []
    different = [f"model.{key}: there {old[key]}, here {new[key]}" for key in new if old[key] != new[key]]
    if different and before.preset != config.model.preset:
        different.insert(0, f"model.preset: there {before.preset}, here {config.model.preset}")
    return different


def _settings(backbone: DiTConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(backbone).items() if key not in TRAINING_ONLY}
