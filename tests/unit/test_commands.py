"""Every command's help: quick, with the name by which it was started, and every default; wrong paths are told in one line."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from data_prep import encode, schema
from data_prep.common.paths import expand
from pretrain.config import PreviewSection
from pretrain.config_files import known
from pretrain.models import __main__ as models_command
from pretrain.models.cost import CAPTION
from pretrain.recipes import RECIPES
from pretrain.sampling.export_writer import DTYPES
from pretrain.sampling.options import add_export_arguments
from pretrain.schedulers import SAMPLERS

# Every module that is a command: it makes its parser by `command_parser` or `run_one_of`, and may be started.
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for package in ("data_prep", "pretrain")
    for file in (ROOT / package).rglob("*.py")
    if re.search(
        r"\b(command_parser|run_one_of)\(.*^if __name__ == ", file.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
)
HEAVY = ("torch", "deepspeed", "streaming", "diffusers", "transformers", "tensorboard", "matplotlib", "webdataset")
SCRIPT = """
import contextlib, importlib, io, json, sys
found = {}
for name in sys.argv[2:]:
    said, sys.argv[0] = io.StringIO(), "focusdit-" + name.split(".")[1]
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        sys.modules["__main__"].__spec__ = None
        importlib.import_module(name).main(["--help"])
    found[name] = [said.getvalue(), [m for m in json.loads(sys.argv[1]) if m in sys.modules]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[str, list[str]]]:
    """Help of each command, and the heavy libraries that were imported when it was shown; all in one process."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(HEAVY), *MODULES]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def test_the_commands_are_found() -> None:
    installed = set(re.findall(r'^    "[\w-]+": "([\w.]+)",$', (ROOT / "setup.py").read_text(), re.MULTILINE))
    assert {"data_prep.encode", "pretrain.train", "pretrain.analyze.__main__"} <= installed
    assert installed | {"pretrain.bench.__main__", "pretrain.chain"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_help_waits_for_no_library(module: str, helps) -> None:
    said, imported = helps[module]
    assert said.startswith(f"usage: focusdit-{module.split('.')[1]} ")
    assert imported == []


def test_help_names_stages_and_where_fields_are_explained(helps) -> None:
    said = " ".join(helps["pretrain.train"][0].split())
    assert all(name in said for name in known())
    assert Path(re.search(r"Fields are explained in (\S+);", said)[1]).samefile(ROOT / "pretrain/config.py")
    assert Path(re.search(r"DeepSpeed's are in (\S+)\.", said)[1]).samefile(ROOT / "ds_configs")


def test_help_has_every_default(helps) -> None:
    said = " ".join(helps["data_prep.shapes"][0].split())
    assert "number of pictures (default: 2000)" in said
    assert "seed of the scenes (default: 0)" in said
    said = " ".join(helps["pretrain.sample"][0].split())
    assert "pictures drawn together (default: 8)" in said
    preview = PreviewSection()
    for name in ("steps", "guidance", "shift"):
        assert f"(default: the run's preview.{name}, {getattr(preview, name):g} unless set)" in said


def test_options_that_wait_for_no_library_are_the_librarys() -> None:
    args = encode.parse(["--input", "x", "--output", "y", "--encoders", "tiny"])
    assert args.shard_mb == schema.SHARD_BYTES >> 20
    for dtype in schema.TEXT_DTYPES:
        assert encode.parse(["--input=x", "--output=y", "--encoders=tiny", f"--text-dtype={dtype}"]).text_dtype == dtype
    from pretrain.sample import parse

    for sampler in SAMPLERS:
        assert parse(["--run=x", "--prompt=y", "--out=z", f"--sampler={sampler}"]).sampler == sampler
    for recipe in RECIPES:
        assert parse(["--run=x", "--prompt=y", "--out=z", f"--recipe={recipe}"]).recipe == recipe
    assert models_command.parse([]).text_tokens == CAPTION
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    for dtype in DTYPES:
        assert parser.parse_args([f"--dtype={dtype}"]).dtype == dtype


@pytest.mark.parametrize(("words", "name"), [
    (["-m", "data_prep.shapes"], "python -m data_prep.shapes"),
    (["data_prep/shapes.py"], "python data_prep/shapes.py"),
])  # fmt: skip
def test_help_has_the_name_by_which_it_was_started(words: list[str], name: str) -> None:
    command = [sys.executable, *words, "--help"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"usage: {name} [-h]")


# ---- paths ----


def test_paths_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert expand("~/x/$SCRATCH/${SCRATCH}") == "/home/me/x//scratch//scratch"
    assert expand("s3://$SCRATCH/a~b") == "s3:///scratch/a~b"
    assert expand("plain ${data.path} ${small} 5$") == "plain ${data.path} ${small} 5$"
    for wrong, said in (("$NOWHERE/x", r"\$NOWHERE is not set"), ("~nobody_of_this_name/x", "no home folder is known")):
        with pytest.raises(ValueError, match=said):
            expand(wrong)


@pytest.mark.parametrize("words", [
    ["--input=~/tars/*.tar", "--output=$SCRATCH/set", "--encoders=tiny"],
    ["--sources=${SCRATCH}/s.yaml", "--output=s3://b/$SCRATCH", "--work=~/w", "--encoders=~/t5+$SCRATCH/vae"],
])  # fmt: skip
def test_a_commands_paths_are_expanded(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    args = vars(encode.parse(words))
    assert not [value for value in map(str, args.values()) if "~" in value or "$" in value]


def test_a_variable_that_is_not_set_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.sample import parse

    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(SystemExit):
        parse(["--run=$NOWHERE/run", "--prompt=x", "--out=out"])
    assert "argument --run: $NOWHERE/run: $NOWHERE is not set; set it, or write the path out" in capsys.readouterr().err


def test_a_file_is_no_folder_to_write_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain.sample import parse

    (tmp_path / "out").touch()
    with pytest.raises(SystemExit):
        parse(["--run=runs/x", "--prompt=x", f"--out={tmp_path}/out"])
    assert f"argument --out: {tmp_path}/out is a file; give a folder" in capsys.readouterr().err


# ---- output ----


def test_a_terminal_without_unicode_ends_no_command() -> None:
    """In the middle of a training a sign that its encoding lacks would be a traceback."""
    script = "from data_prep.common.command import command_parser; command_parser('x'); print('2 × 4 → 8')"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 ? 4 ? 8\n", "")
