"""The built wheel holds all that the commands need: installed into an empty environment, in another folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import ROOT, SMALL

UV = Path(sys.executable).with_name("uv")
# One process for several commands, since each would import for seconds.
FIRST_COMMANDS = """
import sys
import data_prep.encode, pretrain.train
assert data_prep.encode.__file__.startswith(sys.prefix) and pretrain.train.__file__.startswith(sys.prefix)
assert data_prep.encode.main(["--input", "tars/*.tar", "--output", "data", "--encoders", "tiny", "--resolutions", "256"]) == 0
words = ["demo_256", "data.path=data", "steps=2", *sys.argv[1:]]
assert pretrain.train.main(words) == 0
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; the dependencies are this one's, without its link to the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("pretrain", "data_prep", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    run = {"check": True, "cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    subprocess.run([UV, "build", "--wheel", "--out-dir", folder, source], **run)  # type: ignore[call-overload]
    (wheel,) = folder.glob("*.whl")
    subprocess.run([UV, "venv", "--python", sys.executable, folder / "env"], **run)  # type: ignore[call-overload]
    python = folder / "env/bin/python"
    subprocess.run([UV, "pip", "install", "--python", python, "--no-deps", wheel], **run)  # type: ignore[call-overload]
    (there,) = (folder / "env").glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but its own .pth files, such as that of an editable install, are not read.
    (there / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env"


def test_the_first_commands_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    def run(*words: object, **env: str) -> str:
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"} | env
        done = subprocess.run([*map(str, words)], cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run(environment / "bin/focusdit-shapes", "--output", "tars", "--pictures", "8") == "tars/00000.tar\n"
    run(environment / "bin/python", "-c", FIRST_COMMANDS, *SMALL)
    assert json.loads((tmp_path / "runs/demo_256/ds_config.json").read_text())["train_batch_size"] == 4
    said = run(environment / "bin/focusdit-train", "demo_256", "--check", "data.path=data", *SMALL)
    assert said.startswith("demo_256: 0 problems\n")
    commands = {
        "ablate",
        "analyze",
        "compare",
        "convert",
        "demo",
        "encode",
        "evaluate",
        "export",
        "import-release",
        "launch",
        "models",
        "plan",
        "prune",
        "reference",
        "sample",
        "shapes",
        "train",
    }
    there = {p.name.removeprefix("focusdit-") for p in (environment / "bin").glob("focusdit-*")}
    assert there == commands | {"verify"}
