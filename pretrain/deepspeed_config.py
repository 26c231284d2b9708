"""DeepSpeed's part of a stage's configuration: its JSON file, overrides, and what this project needs of it."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

# Keys that an override may add to a DeepSpeed file, beside those that the file has.
DEEPSPEED_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping", "bf16", "data_types",
    "communication_data_type", "zero_optimization", "wall_clock_breakdown", "flops_profiler", "comms_logger",
}  # fmt: skip


def read_deepspeed(path: Path, changes: Any, problems: list[str]) -> dict[Any, Any]:
    """Reads a DeepSpeed JSON and lays the overrides `changes` over it; each problem is added to `problems`, one line each."""
    if not path.is_file():
        problems.append(f"{path}: this stage's DeepSpeed file is missing")
        return {}
    if not isinstance(changes, dict):
        problems.append(f"deepspeed: {changes!r} is no section; override as deepspeed.key=value")
        changes = {}
    shipped = json.loads(path.read_text())
    content = OmegaConf.to_container(OmegaConf.merge(shipped, changes))
    assert isinstance(content, dict)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if not isinstance(content.get(key), int) or content[key] < 1:
            problems.append(f"deepspeed.{key}: {content.get(key)!r} must be a whole number above 0 (in {path})")
    # DeepSpeed itself ignores what it does not know; the accumulation has a message of its own below.
    for key in sorted(changes.keys() - DEEPSPEED_KEYS - shipped.keys() - {"gradient_accumulation_steps"}):
        near = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1)
        problems.append(f"deepspeed.{key}: unknown field" + (f"; did you mean {near[0]!r}?" if near else ""))
    zero = content.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") != 2:
        problems.append(f"deepspeed.zero_optimization.stage: must be 2 (in {path})")
    if isinstance(zero, dict) and {"offload_optimizer", "offload_param"} & zero.keys():
        problems.append(f"deepspeed.zero_optimization: offloading is not supported; leave it out (in {path})")
    if "gradient_accumulation_steps" in content:
        problems.append("deepspeed.gradient_accumulation_steps: leave it out; it follows from the batch and the GPUs")
    return content
