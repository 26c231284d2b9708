"""Folders of weights that are not what they should be: one clear line that names the file, and nothing of theirs is run."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.encoders import Vae
from pretrain.checkpoint.export_folder import check_export, check_transformer, differences, tensor_shapes
from pretrain.pipeline import FocusDiTPipeline, FocusDiTTransformer2DModel

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
PICKLES = {"transformer": "diffusion_pytorch_model.bin", "vae": "diffusion_pytorch_model.bin"} | {
    "text_encoder": "pytorch_model.bin"
}
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


@pytest.fixture
def folder(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """An export to break."""
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "export"))


def refusal(folder: Path, load: Callable[..., Any] = FocusDiTPipeline.from_pretrained, **kwargs: Any) -> str:
    """The one line that loading the folder is refused with."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        load(folder, **kwargs)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def change(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_backbone(folder: Path, **fields: Any) -> None:
    path = folder / "transformer" / "config.json"
    change(path, backbone=json.loads(path.read_text())["backbone"] | fields)


class Marks:
    """Its pickle makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def plant(folder: Path, marker: Path, name: str = "evil", kind: str = "Evil") -> None:
    """A module whose import makes a file."""
    sys.modules.pop("evil", None)
    methods = "    @classmethod\n    def from_pretrained(cls, *a, **k): return cls()\n"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass {kind}:\n{methods}")


# ---- the export as a whole ----


def test_a_whole_export_passes(folder):
    assert check_export(folder) == {}
    assert FocusDiTPipeline.from_pretrained(folder).config.resolution == 64


@pytest.mark.parametrize("path", ["/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_missing_folder(path):
    with pytest.raises(FileNotFoundError, match=f"^no weights at {path}: neither a hub name nor a local folder$"):
        FocusDiTPipeline.from_pretrained(path)


def test_no_export(tmp_path):
    assert (
        refusal(tmp_path)
        == f"{tmp_path} is no export: it has no model_index.json; make one with python -m pretrain.export"
    )


def test_another_pipelines_folder(folder):
    change(folder / "model_index.json", _class_name="PixArtAlphaPipeline")
    assert refusal(folder) == f"{folder / 'model_index.json'} is of a PixArtAlphaPipeline, not of a FocusDiTPipeline"


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_missing_component(folder, component):
    shutil.rmtree(folder / component)
    assert refusal(folder) == f"{folder} is no whole export: {component}/ is missing; export again"


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_that_the_index_does_not_name(folder, component):
    path = folder / "model_index.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != component}))
    assert refusal(folder).startswith(f"{path}: {component} is []; expected ['")


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_class_of_the_folders_own_is_never_run(folder, tmp_path, monkeypatch, component):
    marker = tmp_path / "ran"
    for place in (folder, folder / component):
        plant(place, marker)
    monkeypatch.syspath_prepend(folder)
    change(folder / "model_index.json", **{component: ["evil", "Evil"]})
    assert refusal(folder).startswith(f"{folder / 'model_index.json'}: {component} is ['evil', 'Evil']; expected ['")
    assert not marker.exists()


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_module_of_the_folders_own_under_a_known_name_is_never_run(folder, tmp_path, component):
    """diffusers looks for a component's module in its folder first."""
    module, kind = json.loads((folder / "model_index.json").read_text())[component]
    plant(folder / component, tmp_path / "ran", module, kind)
    try:
        FocusDiTPipeline.from_pretrained(folder)
    except ValueError as refused:
        assert "custom code" in str(refused)  # noqa: PT017
    assert not (tmp_path / "ran").exists()


def test_a_further_component_is_never_run(folder, tmp_path, monkeypatch):
    plant(folder / "extra", tmp_path / "ran")
    monkeypatch.syspath_prepend(folder / "extra")
    change(folder / "model_index.json", extra=["evil", "Evil"])
    FocusDiTPipeline.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("component", ["vae", "scheduler"])
def test_a_class_of_the_folders_own_is_never_run_for_a_referenced_encoder(folder, tmp_path, monkeypatch, component):
    plant(folder, tmp_path / "ran")
    monkeypatch.syspath_prepend(folder)
    about = {component: {"name": "tiny", "fingerprint": Vae("tiny").fingerprint}}
    change(folder / "model_index.json", references=about, **{component: ["evil", "Evil"]})
    assert refusal(folder).startswith(
        f"{folder / 'model_index.json'}: {'vae is [' if component == 'vae' else 'references must give'}"
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize("content", [b"", b'{"a": 1,', b"\xff\xfe\x00", b"[1, 2]"])
def test_broken_json(folder, file, content):
    (folder / file).write_bytes(content)
    assert refusal(folder).startswith(f"{folder / file}")


@pytest.mark.parametrize(
    "fields",
    [{"vae": 5}, {"vae": [["diffusers"], "AutoencoderKL"]}, {"references": ["vae"]}, {"references": {"vae": {}}}],
)
def test_an_index_of_the_wrong_form(folder, fields):
    change(folder / "model_index.json", **fields)
    assert str(folder / "model_index.json") in refusal(folder)


@pytest.mark.parametrize(
    "file",
    [
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_broken_json_of_the_other_components(folder, file):
    (folder / file).write_text('{"a": 1,')
    assert str(folder / file) in refusal(folder)


# ---- weights ----


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("keep", [0.5, 0.999999, 0, 8, 100])
def test_truncated_weights(folder, component, keep):
    """Cut in the middle, near the end, and in the header."""
    path = folder / component / WEIGHTS[component]
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    said = refusal(folder)
    assert said.startswith(f"{path} is no whole safetensors file (")
    assert said.endswith("); copy it again")


def test_any_bit_of_the_header_may_be_wrong(folder):
    path, dice = folder / "transformer" / WEIGHTS["transformer"], random.Random(0)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in [0, 3, 7, 8, *(dice.randrange(header) for _ in range(20))]:
        changed = bytearray(content)
        changed[place] ^= 1 << dice.randrange(8)
        path.write_bytes(changed)
        assert str(folder / "transformer") in refusal(
            folder / "transformer", FocusDiTTransformer2DModel.from_pretrained
        )
    path.write_bytes(content)
    FocusDiTTransformer2DModel.from_pretrained(folder / "transformer")


def rewrite(folder: Path, component: str, changes: dict[str, torch.Tensor | None]) -> None:
    """Replaces, adds or (None) removes tensors of a component."""
    path = folder / component / WEIGHTS[component]
    state = {name: tensor for name, tensor in (load_file(path) | changes).items() if tensor is not None}
    save_file(state, path, metadata={"format": "pt"})


def test_names_and_shapes_that_do_not_fit_are_listed(folder):
    rewrite(
        folder,
        "transformer",
        {
            "dit.final.proj.weight": torch.zeros(3, 3),
            "dit.final.proj.bias": None,
            "dit.time_embed.linear_1.bias": None,
            "dit.extra": torch.zeros(1),
        },
    )
    assert refusal(folder) == (
        f"{folder / 'transformer'} holds weights of another model: missing dit.final.proj.bias, "
        "dit.time_embed.linear_1.bias; unknown dit.extra; another shape: dit.final.proj.weight [3, 3] instead of [64, 256]"
    )


def test_weights_of_another_width(folder):
    change_backbone(folder, width=128)
    said = refusal(folder)
    assert said.startswith(f"{folder / 'transformer'} holds weights of another model: another shape: ")
    assert said.endswith("more"), "long lists are cut"
    assert len(said) < 3000


@pytest.mark.parametrize(
    ("component", "tensor"),
    [("vae", "decoder.conv_in.weight"), ("text_encoder", "encoder.block.0.layer.0.SelfAttention.k.weight")],
)
def test_missing_tensors_of_the_encoders(folder, component, tensor):
    rewrite(folder, component, {tensor: None})
    assert tensor in refusal(folder)


def test_differences():
    wanted = {"a": (1, 2), "b": (3,), "c": ()}
    assert differences(wanted, dict(wanted)) == ""
    assert differences(wanted, {"a": (2, 1), "c": (), "d": (4,)}) == (
        "missing b; unknown d; another shape: a [2, 1] instead of [1, 2]"
    )
    many = differences({f"t{i:02}": (1,) for i in range(30)}, {})
    assert many == "missing " + ", ".join(f"t{i:02}" for i in range(20)) + " and 10 more"


@pytest.mark.parametrize("component", WEIGHTS)
def test_a_pickle_is_never_read(folder, tmp_path, component):
    (folder / component / WEIGHTS[component]).unlink()
    (folder / component / PICKLES[component]).write_bytes(pickle.dumps(Marks(tmp_path / "ran")))
    assert refusal(folder) == (
        f"{folder / component} has no {WEIGHTS[component]}; {PICKLES[component]} is a pickle, which is never read: "
        "convert it to safetensors"
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("component", WEIGHTS)
def test_a_pickle_under_a_false_name_is_never_read(folder, tmp_path, component):
    path = folder / component / WEIGHTS[component]
    path.write_bytes(pickle.dumps(Marks(tmp_path / "ran")))
    assert refusal(folder).startswith(f"{path} is no whole safetensors file (")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_the_weights_is_left_alone(folder, tmp_path):
    for component, name in PICKLES.items():
        (folder / component / name).write_bytes(pickle.dumps(Marks(tmp_path / "ran")))
    FocusDiTPipeline.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [False])
@pytest.mark.parametrize("load", [FocusDiTPipeline.from_pretrained, FocusDiTTransformer2DModel.from_pretrained])
def test_pickles_cannot_be_asked_for(folder, load, value):
    assert refusal(folder, load, use_safetensors=value).startswith(
        "use_safetensors: weights are read from safetensors only"
    )


def shard(folder: Path, component: str, name: str) -> Path:
    """Moves a component's weights to `name`, as its index says. Returns where they are."""
    path = folder / component / WEIGHTS[component]
    weights = dict.fromkeys(load_file(path), name)
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return path.rename(path.parent / name)


@pytest.mark.parametrize("component", WEIGHTS)
def test_weights_in_shards(folder, component):
    shapes = tensor_shapes(folder / component, WEIGHTS[component])
    shard(folder, component, "part.safetensors")
    assert tensor_shapes(folder / component, WEIGHTS[component]) == shapes
    FocusDiTPipeline.from_pretrained(folder)


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("name", ["../../outside.safetensors", "../outside.safetensors", "{absolute}"])
def test_an_index_does_not_lead_out_of_its_folder(folder, tmp_path, component, name):
    name = name.format(absolute=tmp_path / "outside.safetensors")
    assert shard(folder, component, name).is_file()
    assert refusal(folder) == f"{folder / component} has no {name}"


@pytest.mark.parametrize("component", WEIGHTS)
def test_a_missing_shard(folder, component):
    shard(folder, component, "part.safetensors").unlink()
    assert refusal(folder) == f"{folder / component} has no part.safetensors"


@pytest.mark.parametrize("names", [["part.safetensors"], {"dit.extra": 1}])
def test_an_index_of_shards_of_the_wrong_form(folder, names):
    path = folder / "transformer" / f"{WEIGHTS['transformer']}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert str(path) in refusal(folder)


# ---- the transformer's config ----


def test_unknown_and_missing_fields_of_the_backbone(folder):
    path = folder / "transformer" / "config.json"
    change_backbone(folder, wdith=256)
    said = refusal(folder)
    assert said.startswith(f"{path}: backbone: ")
    assert "'wdith'" in said
    backbone = json.loads(path.read_text())["backbone"]
    change(path, backbone={k: v for k, v in backbone.items() if k not in ("wdith", "width")})
    assert "'width'" in refusal(folder)


def test_a_backbone_that_cannot_be_built(folder):
    change_backbone(folder, heads=7)
    said = refusal(folder)
    assert said.startswith(str(folder / "transformer" / "config.json"))
    assert "must be divisible by heads" in said


@pytest.mark.parametrize("value", ["256", None, 256.0, 256 * 10**9])
def test_a_backbone_with_values_of_the_wrong_kind(folder, value):
    change_backbone(folder, width=value)
    assert refusal(folder).startswith(str(folder / "transformer" / "config.json"))


def test_a_config_of_something_else(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({"_class_name": "PixArtTransformer2DModel", "num_layers": 28}))
    assert refusal(folder) == f"{path} is not of a FocusDiTTransformer2DModel: it has no backbone"
    path.write_text(json.dumps({"use_q_mask": True}))
    assert refusal(folder).endswith("; import the authors' release with python -m pretrain.import_release")
    path.unlink()
    assert refusal(folder).startswith(f"{path} cannot be read as JSON")


@pytest.mark.parametrize("load", [check_transformer, FocusDiTTransformer2DModel.from_pretrained])
def test_a_transformers_folder_by_itself_is_checked_too(folder, load):
    (folder / "transformer" / WEIGHTS["transformer"]).unlink()
    assert refusal(folder / "transformer", load) == f"{folder / 'transformer'} has no {WEIGHTS['transformer']}"
