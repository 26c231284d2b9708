"""pretrain/sections.py: the config's model section has the backbone's fields, each of which may be left out."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pretrain.config import Config, ModelSection, load
from pretrain.models import PRESETS, DiTConfig, preset
from pretrain.models.mixers.flexdit import FlexDiTSection
from pretrain.models.mixers.mediators import MediatorsSection

FLEXDIT = ("model.preset=dit_tiny_deep", "model.density=flexdit")


def test_every_field_of_the_backbone_with_its_words() -> None:
    own = {"preset", "recompute", "compile", "fp8"}
    assert set(ModelSection.model_fields) - own == {f.name for f in fields(DiTConfig)}
    assert ModelSection.model_fields["depth"].description == "Blocks."
    section = load("demo_256", [*FLEXDIT, "model.flexdit.sparsity=[0.3,0.8]"])[0].model.flexdit  # type: ignore[attr-defined]
    assert section.model_fields_set == {"sparsity"}


def test_fields_left_out_are_the_presets() -> None:
    words = ["model.preset=dit_tiny_deep", "model.heads=null", "model.mask_dropout=null", "model.position_scale=null"]
    config = load("demo_256", words)[0]
    assert config.model.backbone() == preset("dit_tiny_deep")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["model.depth=3"], "depth", 3),
        (["model.position_scale=[1.0,2.0]"], "position_scale", (1.0, 2.0)),
        (["model.attention=mediators", "model.mediators.numbers=[1]"], "mediators", MediatorsSection((1,))),
        ([*FLEXDIT, "model.flexdit.split=[1,1,3,1]"], "flexdit", FlexDiTSection((1, 1, 3, 1), (0.61, 0.86))),
        ([*FLEXDIT, "model.flexdit.sparsity=[0.3,0.8]"], "flexdit", FlexDiTSection(None, (0.3, 0.8))),
        ([*FLEXDIT, "model.flexdit.grid=[8,8]"], "flexdit", FlexDiTSection(grid=(8, 8))),
    ],
)
def test_one_field_overrides_the_presets_and_leaves_its_neighbours(words, name, value) -> None:
    config = load("demo_256", ["model.preset=dit_tiny_deep", *words])[0]
    assert getattr(config.model.backbone(), name) == value
    again = Config.model_validate(config.model_dump(mode="json"))
    assert again == config and again.model.backbone() == config.model.backbone()


@pytest.mark.parametrize("name", PRESETS)
def test_every_field_can_be_set_and_is_kept_in_yaml(name: str, tmp_path: Path) -> None:
    """All of a preset's fields, over another preset, make the one they were taken from; likewise from the run's `config.yaml`."""
    config = load("demo_256")[0].model_dump(mode="json")
    config["model"] |= {"preset": "focusdit_release", **asdict(PRESETS[name])}
    made = Config.model_validate(config)
    assert made.model.backbone() == PRESETS[name]
    OmegaConf.save(OmegaConf.create(made.model_dump(mode="json")), tmp_path / "config.yaml")
    again = Config.model_validate(OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml")))
    assert again == made and again.model.backbone() == PRESETS[name]


def test_a_section_is_not_a_value() -> None:
    with pytest.raises(
        ValueError, match=r"model.mediators: is a section, not \[4\]; set its fields: model.mediators.numbers"
    ):
        load("demo_256", ["model.mediators=[4]"])
