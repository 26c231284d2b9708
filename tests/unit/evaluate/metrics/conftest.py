"""A small random CLIP in transformers' layout, with a tokenizer of single bytes, and pictures to judge."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import ROOT
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast
from transformers.models.clip.tokenization_clip import bytes_to_unicode

from data_prep.shapes import draw, scenes

LIBRARIES = ROOT / ".venv" / "metrics"
TOKENS = 24  # of a caption, with its start and end


@pytest.fixture(scope="session")
def metric_libraries() -> Iterator[None]:
    """torch-fidelity, SciPy and torchmetrics from their own folder, for the tests that ask for them."""
    if not (LIBRARIES / "torch_fidelity").is_dir():
        pytest.fail(f"{LIBRARIES} is missing: `make test` sets it up", pytrace=False)
    sys.path.append(str(LIBRARIES))
    yield
    sys.path.remove(str(LIBRARIES))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP for pictures of 32 pixels; embeddings are 12 wide."""
    folder = tmp_path_factory.mktemp("clip") / "tiny_clip"
    folder.mkdir()
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": TOKENS, "bos_token_id": 512, "eos_token_id": 513}
    vision = {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=small | text | {"pad_token_id": 513}, vision_config=small | vision, projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Five pictures of shapes, one of another size, and four as a reference."""
    for name, count, seed in (("ours", 5, 1), ("theirs", 4, 2)):
        (tmp_path / name).mkdir()
        for i, scene in enumerate(scenes(count, seed)):
            draw(scene, 48 if i == 2 else 64).save(tmp_path / name / f"{i}.png")
    return tmp_path / "ours", tmp_path / "theirs"
