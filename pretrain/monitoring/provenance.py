"""Provenance of a run, kept in its directory: config, DeepSpeed's config, environment, and the data set's card."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from data_prep.common.files import atomic_write
from data_prep.schema import CARD, NULL_TEXT
from pretrain.config import Config
from pretrain.data.loader import Loader
from pretrain.distributed.world import World, barrier

HERE = Path(__file__).resolve().parent


def save_provenance(config: Config, deepspeed: dict[str, Any], loader: Loader, world: World) -> None:
    """Writes the resolved config, DeepSpeed's config, the environment and the data set's card into the run directory."""
    if world.rank == 0:
        run = config.run_dir
        atomic_write(run / "config.yaml", config_yaml(config))
        atomic_write(run / "ds_config.json", json.dumps(deepspeed, indent=2) + "\n")
        atomic_write(run / "environment.json", json.dumps(environment(world), indent=2) + "\n")
        for name in (CARD, NULL_TEXT):
            shutil.copyfile(loader.root / name, run / name)
    barrier(world)


def config_yaml(config: Config) -> str:
    """The resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def environment(world: World) -> dict[str, Any]:
    """Command, code, versions, processes, device and SLURM job of this start."""
    packages = ("torch", "deepspeed", "mosaicml-streaming", "transformers", "diffusers")
    return {
        "argv": sys.argv,
        "git_revision": _git("rev-parse", "HEAD"),
        "git_dirty_diff": _git("diff", "HEAD"),
        "versions": {p: version(p) for p in packages} | {"python": sys.version.split()[0]},
        "processes": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "slurm": {k: v for k, v in os.environ.items() if k.startswith("SLURM_JOB")},
    }


def _git(*words: str) -> str | None:
    """Output of git in this code's checkout; None outside of one. A diff may hold bytes of any encoding."""
    try:
        done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode(errors="backslashreplace").strip()
