"""Previews of one process, with the tiny encoders: when, with which weights, and what they leave as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_prep.encoders import TextEncoder
from data_prep.schema import Card
from pretrain.config import load
from pretrain.distributed.world import World
from pretrain.models import DiT
from pretrain.monitoring import preview as module
from pretrain.monitoring.preview import Preview

ALONE = World(0, 1, torch.device("cpu"))
PROMPTS = ["a small red circle", "a large blue square on a green background"]


class Pictures:
    """In place of the monitor: the pictures by tag, and whether the speed was paused."""

    def __init__(self) -> None:
        self.drawn: dict[str, np.ndarray] = {}
        self.running = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.running = False
        yield
        self.running = True

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        assert not self.running
        self.drawn[f"{tag}/{step}"] = np.asarray(image)


class Average:
    """In place of the average: within `applied` every weight of the last layer is that of another model."""

    def __init__(self, model: DiT, other: torch.Tensor) -> None:
        self.weight, self.other = model.final.proj.weight, other

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = self.weight.detach().clone()
        self.weight.data.copy_(self.other)
        yield
        self.weight.data.copy_(before)


@pytest.fixture
def made(data_set: Path, tmp_path: Path):
    """Builds the preview of a run with two prompts."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = [f"run_dir={tmp_path}", f"data.path={data_set}", f"preview.prompts={tmp_path / 'prompts.txt'}"]

    def build(*overrides: str) -> Preview:
        config = load("demo_256", [*words, "preview.steps=2", *overrides])[0]
        return Preview(config, Card.load(data_set), data_set, ALONE)

    return build


@pytest.fixture
def model(made) -> DiT:
    torch.manual_seed(0)
    dit = DiT(made().config.model.backbone())
    with torch.no_grad():
        dit.final.proj.weight.normal_(std=0.05)
    return dit.train()


def test_previews_are_due_every_so_many_steps_and_after_the_last(made) -> None:
    words = ["steps=10", "optimizer.warmup_steps=1"]
    every_four = made(*words, "preview.every=4")
    assert [step for step in range(1, 11) if every_four.due(step)] == [4, 8, 10]
    never = made(*words, "preview.every=0")
    assert not [step for step in range(1, 11) if never.due(step)]


def test_the_prompts_are_encoded_once_for_all_starts(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made()
    (path,) = tmp_path.glob("preview_text_*.safetensors")
    expected = TextEncoder.of(first.card.text_encoder, ALONE.device).encode(PROMPTS, first.card.token_cap)[0]
    assert [torch.equal(a, b) for a, b in zip(load_file(path).values(), expected, strict=True)] == [True, True]
    monkeypatch.setattr(module, "TextEncoder", None)  # would fail
    again = made()
    assert all(torch.equal(a, b) for a, b in zip(first.texts, again.texts, strict=True))


def test_other_prompts_are_encoded_anew(made, tmp_path: Path) -> None:
    made()
    (tmp_path / "prompts.txt").write_text("a green triangle")
    assert len(made().texts) == 1
    assert len(list(tmp_path.glob("preview_text_*"))) == 2


def test_it_draws_with_the_average_and_leaves_the_model_as_it_was(made, model: DiT) -> None:
    """The same pictures as a model whose own weights are the average."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = torch.randn_like(model.final.proj.weight) * 0.05
    averaged, own, plain = Pictures(), Pictures(), Pictures()
    preview = made()
    preview.draw(model, Average(model, other), averaged, 7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    preview.draw(model, Average(model, model.final.proj.weight.detach().clone()), plain, 7)
    model.final.proj.weight.data.copy_(other)
    preview.draw(model, Average(model, other), own, 7)
    assert averaged.drawn.keys() == {"samples/ema/7", "masks/first_prompt/7"}
    assert all(np.array_equal(averaged.drawn[tag], own.drawn[tag]) for tag in averaged.drawn)
    assert not np.array_equal(averaged.drawn["samples/ema/7"], plain.drawn["samples/ema/7"])


def test_a_model_without_masks_has_no_mask_map(made, model: DiT) -> None:
    preview = made("model.mask=none")
    dense = DiT(preview.config.model.backbone())
    pictures: Any = Pictures()
    preview.draw(dense, Average(dense, dense.final.proj.weight.detach().clone()), pictures, 3)
    assert pictures.drawn.keys() == {"samples/ema/3"}
