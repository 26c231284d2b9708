"""DeepSpeed's part of a stage's configuration: its JSON file, what is laid over it, and what this project needs of it."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config_files import KEPT_DEEPSPEED, ConfigFiles

# Settings of DeepSpeed that serve here; it ignores by itself what it does not know.
DEEPSPEED_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping", "bf16", "data_types",
    "zero_optimization", "wall_clock_breakdown", "flops_profiler", "steps_per_print",
}  # fmt: skip
# Settings that others' files have, and what is in their place here.
ELSEWHERE = {
    "optimizer": "the config's section optimizer",
    "scheduler": "the config's optimizer.schedule",
    "fp16": "bf16",
    "amp": "bf16",
    "activation_checkpointing": "the config's model.recompute",
    "tensorboard": "the config's section logging",
}
# Settings that have no effect here, or are not worth their price; a run of an earlier version may have kept some.
OWN_REDUCTION = "has no effect, as gradients are reduced in fp32 by pretrain/distributed/gradients.py"
REFUSED = {
    "communication_data_type": OWN_REDUCTION,
    "comms_logger": "waits for the device after each of DeepSpeed's collectives, and does not see the reduction of gradients",
    "timers": "waits for the device twice in each micro-batch; the curves speed/… need no timer",
    "zero_optimization.allgather_bucket_size": "has no effect in DeepSpeed 0.19.7, which gathers each group at once",
} | {
    f"zero_optimization.{key}": OWN_REDUCTION
    for key in ("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce")
}


def read_deepspeed(files: ConfigFiles, problems: list[str]) -> dict[str, Any]:
    """The DeepSpeed settings of a config's files; each problem is added to `problems`, one line each."""
    path, changes = files.deepspeed_file, files.deepspeed_changes
    if path is None:
        problems.append(
            "deepspeed: missing; name its JSON file (deepspeed: FILE.json), or take a stage's (base: STAGE)"
        )
        return {}
    if (own := _read(path, problems)) is None:
        return {}
    try:
        content = OmegaConf.to_container(OmegaConf.merge(own, changes))
    except OmegaConfBaseException as error:
        problems.append(f"deepspeed: {' '.join(str(error).split())}")
        return {}
    assert isinstance(content, dict)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if type(content.get(key)) is not int or content[key] < 1:
            problems.append(f"deepspeed.{key}: {content.get(key)!r} must be a whole number above 0 (in {path})")
    if "gradient_accumulation_steps" in content:
        problems.append("deepspeed.gradient_accumulation_steps: leave it out; it follows from the batch and the GPUs")
    for key in sorted(content.keys() - DEEPSPEED_KEYS - REFUSED.keys() - {"gradient_accumulation_steps"}):
        near = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1)
        mend = f"is not used, but {ELSEWHERE[key]}; leave it out" if key in ELSEWHERE else "unknown field"
        problems.append(f"deepspeed.{key}: {mend}" + (f"; did you mean {near[0]!r}?" if near else ""))
    zero = content.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") != 2:
        problems.append(
            f'deepspeed.zero_optimization.stage: must be 2: "zero_optimization": {{"stage": 2}} (in {path})'
        )
    if isinstance(zero, dict) and {"offload_optimizer", "offload_param"} & zero.keys():
        problems.append(f"deepspeed.zero_optimization: offloading is not supported; leave it out (in {path})")
    given = content.keys() | {f"zero_optimization.{key}" for key in (zero if isinstance(zero, dict) else ())}
    problems += [f"deepspeed.{key}: {reason}; leave it out" for key, reason in REFUSED.items() if key in given]
    if content.get("data_types", {"grad_accum_dtype": "fp32"}) != {"grad_accum_dtype": "fp32"}:
        problems.append(
            "deepspeed.data_types: gradients are always added up in fp32; leave it out, or set grad_accum_dtype=fp32"
        )
    return {str(key): value for key, value in content.items()}


def _read(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """A JSON file's settings; None where it is not there or no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(
            f"deepspeed: no DeepSpeed file {path} ({error.strerror}); it is looked up from its YAML's folder"
        )
        return None
    except ValueError as error:
        problems.append(f"deepspeed: {path} is not JSON: {error}")
        return None
    if not isinstance(content, dict):
        problems.append(f"deepspeed: {path} must hold an object, {{…}}")
        return None
    if path.name == KEPT_DEEPSPEED:  # of the run's own number of processes
        content.pop("gradient_accumulation_steps", None)
        for key in REFUSED:
            section, _, name = key.rpartition(".")
            holder = content.get(section) if section else content
            if isinstance(holder, dict):
                holder.pop(name, None)
    return content
