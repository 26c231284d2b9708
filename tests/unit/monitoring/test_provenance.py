"""What the run directory keeps can be read back, and names the code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from support import ROOT

from data_prep.schema import CARD, NULL_TEXT
from pretrain.config import Config, load
from pretrain.distributed.world import World
from pretrain.monitoring import provenance
from pretrain.monitoring.provenance import environment, save_provenance

CPU = torch.device("cpu")


@pytest.fixture
def loader(tmp_path: Path) -> Any:
    """A loader of a data set whose card and null text are these bytes."""
    root = tmp_path / "set"
    root.mkdir()
    (root / CARD).write_bytes(b"card")
    (root / NULL_TEXT).write_bytes(b"null text")
    return SimpleNamespace(root=root)


def test_all_that_a_run_was_started_with_is_kept(loader: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    overrides = [f"run_dir={run}", "data.path=/set", "guard.min_history=7", "optimizer.betas=[0.5,0.75]"]
    config, deepspeed = load("demo_256", overrides)
    save_provenance(config, deepspeed, loader, World(0, 1, CPU))
    assert Config.model_validate(OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))) == config
    assert json.loads((run / "ds_config.json").read_text()) == deepspeed
    assert json.loads((run / "environment.json").read_text())["argv"] == sys.argv
    assert (run / CARD).read_bytes() == b"card"
    assert (run / NULL_TEXT).read_bytes() == b"null text"


def test_other_processes_write_nothing(loader: Any, tmp_path: Path) -> None:
    config, deepspeed = load("demo_256", [f"run_dir={tmp_path / 'none'}", "data.path=/set"])
    save_provenance(config, deepspeed, loader, World(1, 1, CPU))
    assert not (tmp_path / "none").exists()


def test_the_environment_names_code_versions_and_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    found = environment(World(0, 4, CPU))
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert (found["processes"], found["device"], found["slurm"]["SLURM_JOB_ID"]) == (4, "cpu", "7")
    assert "SLURM_NTASKS" not in found["slurm"]
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert found["git_revision"] == (git.stdout.strip() if git.returncode == 0 else None)


def test_outside_of_a_checkout_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment(World(0, 1, CPU))["git_revision"] is None


def test_a_diff_of_any_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed file in Latin-1 or with raw bytes must not keep a training from starting."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "notes").write_text("one\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "notes").write_bytes(b"caf\xe9\n")
    monkeypatch.setattr(provenance, "HERE", tmp_path)
    assert "+caf\\xe9" in json.loads(json.dumps(environment(World(0, 1, CPU))))["git_dirty_diff"]
