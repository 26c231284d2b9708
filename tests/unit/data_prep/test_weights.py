"""The names of frozen encoders, and the folders that they lead to: safetensors alone, or the command that makes them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import T5EncoderModel

from data_prep import weights
from data_prep.encoders import TextEncoder, Vae, read_vae
from data_prep.weights import ASSETS, TEXT_ENCODERS, VAES, local_folder, parse_encoders

TINY = {"text": ASSETS / "tiny_t5", "vae": ASSETS / "tiny_vae"}


def test_a_spec_is_two_names():
    with pytest.raises(ValueError, match="expected `tiny` or"):
        parse_encoders("flan-t5-xxl")
    assert parse_encoders("flan-t5-xxl+mochi") == ("flan-t5-xxl", "mochi")


def pickled(folder: Path, kind: str) -> Path:
    """The tiny encoder of a kind, its weights as a pickle, as older repositories hold them."""
    if kind == "text":
        T5EncoderModel.from_pretrained(TINY[kind]).save_pretrained(folder, safe_serialization=False)
        for path in (*TINY[kind].glob("*token*"), *TINY[kind].glob("*.model")):
            (folder / path.name).write_bytes(path.read_bytes())
    else:
        AutoencoderKL.from_pretrained(TINY[kind]).save_pretrained(folder, safe_serialization=False)
    assert not list(folder.glob("*.safetensors"))
    return folder


@pytest.mark.parametrize(("kind", "load"), [("text", TextEncoder), ("vae", Vae)])
def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path, kind, load):
    """The command is run as it stands in the message, and what it makes is the same encoder."""
    folder = pickled(tmp_path / "pickles", kind)
    with pytest.raises(ValueError, match="holds no safetensors but pickles, which are never read") as refused:
        load(str(folder))
    said = str(refused.value)
    assert "\n" not in said
    assert said.startswith(f"{folder} ")
    python, *words = shlex.split(said[said.index("python -c ") :])
    assert python == "python"
    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, capture_output=True)
    assert load(str(tmp_path / "models" / "pickles")).fingerprint == load("tiny").fingerprint


class Hub:
    """Stands in for the hub's client: a repository's files, by the patterns that are asked for."""

    def __init__(self, root: Path):
        self.root = root
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, repository: str, **words: object) -> str:
        self.asked.append((repository, words))
        return str(self.root)


@pytest.mark.parametrize(
    ("name", "known", "convert"),
    [
        ("google/t5-v1_1-xxl", TEXT_ENCODERS, "T5EncoderModel, AutoTokenizer)"),
        ("someone/old-vae:vae", VAES, "AutoModel.from_pretrained('someone/old-vae', subfolder='vae', use_safetensors=False)"),
    ],
)  # fmt: skip
def test_a_repository_without_safetensors(tmp_path, monkeypatch, name, known, convert):
    """Only safetensors are fetched, so the folder has a config alone."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(weights, "snapshot_download", hub := Hub(tmp_path))
    with pytest.raises(ValueError, match="holds no safetensors but pickles") as refused:
        local_folder(name, known)
    assert convert in str(refused.value)
    ((_, words),) = hub.asked
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in words["allow_patterns"])


def test_an_earlier_name_whose_repository_holds_pickles(monkeypatch):
    """It is refused before anything is fetched, and is on no list."""
    monkeypatch.setattr(weights, "snapshot_download", lambda *a, **k: pytest.fail("nothing shall be fetched"))
    with pytest.raises(ValueError, match=r"t5-v1_1-xxl holds no safetensors .* new folder models/t5-v1_1-xxl: "):
        TextEncoder("t5-v1.1-xxl")
    with pytest.raises(ValueError, match="known text encoders") as refused:
        parse_encoders("t5")
    assert "v1.1" not in str(refused.value)


def test_the_hubs_words_reach_its_client(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "snapshot_download", hub := Hub(TINY["text"]))
    assert local_folder("someone/t5", TEXT_ENCODERS, token="t", cache_dir="/c", local_files_only=True) == TINY["text"]
    ((repository, words),) = hub.asked
    assert repository == "someone/t5"
    assert (words["token"], words["cache_dir"], words["local_files_only"]) == ("t", "/c", True)


def test_a_variants_files_are_read(tmp_path):
    """Beside a file of other numbers, which the variant is not."""
    model = AutoencoderKL.from_pretrained(TINY["vae"])
    model.save_pretrained(tmp_path, variant="fp16")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path)
    read = read_vae(tmp_path, torch.float32, "fp16").state_dict()
    expected = load_file(TINY["vae"] / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(read[name], value.float()) for name, value in expected.items())


def test_a_single_file_is_told_from_a_folder(tmp_path):
    """As other tools keep a T5."""
    file = tmp_path / "t5xxl_fp16.safetensors"
    file.write_bytes((TINY["text"] / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"is a single file; give a folder in transformers' or diffusers' layout"):
        TextEncoder(str(file))


def test_a_folder_that_a_repository_does_not_have(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "snapshot_download", Hub(tmp_path))
    with pytest.raises(ValueError, match="someone/model has no folder vea with"):
        Vae("someone/model:vea")
