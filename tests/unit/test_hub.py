"""The words of diffusers' `from_pretrained`: each is followed or refused by name; and diffusers' own way to an export."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from support import same_pictures

from data_prep import weights
from data_prep.encoders import TextEncoder, Vae
from pretrain import hub
from pretrain.pipeline import FocusDiTPipeline, FocusDiTTransformer2DModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tiny_pipeline_folder: Path) -> Path:
    return tiny_pipeline_folder


@pytest.fixture(scope="module")
def halves(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline in fp16 under the variant's names, one component in shards, and nothing beside."""
    out = tmp_path_factory.mktemp("fp16") / "variant"
    pipe = FocusDiTPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    pipe.save_pretrained(out, variant="fp16")
    shutil.rmtree(out / "transformer")
    pipe.transformer.save_pretrained(out / "transformer", variant="fp16", max_shard_size="2MB")
    return out


def state(pipe: FocusDiTPipeline) -> dict[str, torch.Tensor]:
    parts = {"transformer": pipe.transformer, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


def draw(pipe: Any) -> list[Any]:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), num_inference_steps=2).images


# ---- diffusers' own way ----


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that diffusers copies a pipeline's file to."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "modules"


def test_diffusers_loads_an_export(folder, modules):
    pipe = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    assert type(pipe) is FocusDiTPipeline
    assert same_pictures(draw(pipe), draw(FocusDiTPipeline.from_pretrained(folder)))


def test_without_trust_diffusers_says_what_to_pass(folder, modules):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(str(folder))


def test_without_the_package_the_folders_file_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pretrain.pipeline", None)
    with pytest.raises(
        ImportError, match=r"needs the package focusdit-pretrain .*: install the project that trained it"
    ):
        exec(hub.CUSTOM_PIPELINE_SOURCE, {})


def test_what_diffusers_loads_without_encoders_says_so(folder, modules, tmp_path):
    """An export that only names its encoders."""
    copy = Path(shutil.copytree(folder, tmp_path / "export"))
    index = json.loads((copy / "model_index.json").read_text())
    index |= {part: [None, None] for part in ("tokenizer", "text_encoder", "vae")}
    encoders = {"text_encoder": TextEncoder("tiny"), "vae": Vae("tiny")}
    index["references"] = {part: {"name": "tiny", "fingerprint": e.fingerprint} for part, e in encoders.items()}
    (copy / "model_index.json").write_text(json.dumps(index))
    pipe = DiffusionPipeline.from_pretrained(str(copy), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"no VAE: load it by FocusDiTPipeline.from_pretrained"):
        draw(pipe)
    with pytest.raises(ValueError, match=r"no text encoder: load it by FocusDiTPipeline.from_pretrained"):
        pipe("a red circle", output_type="latent")
    assert same_pictures(draw(FocusDiTPipeline.from_pretrained(copy)), draw(FocusDiTPipeline.from_pretrained(folder)))
    with pytest.raises(ValueError, match=r"device_map: this export only names its encoders \(tiny, tiny\)"):
        FocusDiTPipeline.from_pretrained(copy, device_map="cpu")


# ---- variants ----


def test_a_variant_is_loaded(folder, halves):
    assert {p.name for p in (halves / "vae").glob("*.safetensors")} == {"diffusion_pytorch_model.fp16.safetensors"}
    assert len(list((halves / "transformer").glob("*.fp16-*.safetensors"))) > 1
    loaded = FocusDiTPipeline.from_pretrained(halves, variant="fp16", torch_dtype=torch.float16)
    expected = state(FocusDiTPipeline.from_pretrained(folder, torch_dtype=torch.float16))
    got = state(loaded)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert {value.dtype for name, value in got.items() if not name.startswith("text_encoder")} == {torch.float16}
    alone = FocusDiTTransformer2DModel.from_pretrained(halves, subfolder="transformer", variant="fp16")
    assert torch.equal(alone.dit.final.proj.weight.half(), loaded.transformer.dit.final.proj.weight)


def test_a_variant_of_one_component(folder, halves, tmp_path):
    """As diffusers does it: the variant where it is, the plain files elsewhere."""
    mixed = Path(shutil.copytree(folder, tmp_path / "mixed"))
    shutil.rmtree(mixed / "transformer")
    shutil.copytree(halves / "transformer", mixed / "transformer")
    assert draw(FocusDiTPipeline.from_pretrained(mixed, variant="fp16"))
    with pytest.raises(ValueError, match=r"has no diffusion_pytorch_model.safetensors"):
        FocusDiTPipeline.from_pretrained(mixed)


@pytest.mark.parametrize("variant", ["bf16", "../fp16"])
def test_a_variant_that_is_not_there(folder, variant):
    with pytest.raises(ValueError, match=rf"^variant: .* has no weights of the variant {re.escape(variant)}$"):
        FocusDiTPipeline.from_pretrained(folder, variant=variant)
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model"):
        FocusDiTTransformer2DModel.from_pretrained(folder / "transformer", variant=variant)


# ---- the other words ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"varant": "fp16"}, "varant: from_pretrained cannot follow it here; the words are revision, "),
        ({"dtype": torch.bfloat16}, "dtype: from_pretrained cannot follow it here; say torch_dtype"),
        ({"trust_remote_code": True}, "trust_remote_code: .* no code of a folder's own is run"),
        ({"custom_pipeline": "x"}, "custom_pipeline: .* this class is the pipeline"),
        ({"device": "cuda"}, r"device: .* or call .to\(device\)"),
        ({"revision": "main"}, "revision: 'main' is of a repository on the hub, but .* is a local folder"),
        ({"subfolder": "nowhere"}, "subfolder: .* has no folder nowhere"),
        ({"torch_dtype": "float16"}, "torch_dtype: 'float16' is no torch.dtype; give torch.bfloat16"),
        ({"torch_dtype": {"unet": torch.float16}}, "torch_dtype: there is no component unet"),
        ({"from_flax": True}, "from_flax: "),
        ({"use_onnx": True}, "use_onnx: "),
        ({"output_loading_info": True}, "output_loading_info: "),
        ({"safety_checker": "x"}, "safety_checker: "),
    ],
)
def test_a_word_that_cannot_be_followed_is_refused_by_name(folder, words, said):
    with pytest.raises(ValueError, match=f"^{said}") as refused:
        FocusDiTPipeline.from_pretrained(folder, **words)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "words", [{"use_onnx": False}, {"from_flax": None}, {"use_safetensors": None}, {"revision": None}]
)
def test_words_that_ask_for_nothing(folder, words):
    FocusDiTTransformer2DModel.from_pretrained(folder / "transformer", **words)


def test_the_downloads_words_reach_the_hub(folder, monkeypatch):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        weights, "snapshot_download", lambda name, **words: asked.update(name=name, **words) or str(folder)
    )
    given = {"revision": "v1", "token": "t", "cache_dir": "/c", "local_files_only": True, "force_download": True}
    assert draw(FocusDiTPipeline.from_pretrained("someone/model", **given))
    assert given.items() <= asked.items()
    assert asked["name"] == "someone/model"
    asked.clear()
    FocusDiTTransformer2DModel.from_pretrained("someone/model", subfolder="transformer", **given)
    assert given.items() <= asked.items()


def test_a_local_folder_needs_no_download(folder):
    """So that what is said of one is met."""
    FocusDiTTransformer2DModel.from_pretrained(folder / "transformer", local_files_only=True, token="t", cache_dir="/c")


def test_subfolder_dtypes_and_components(folder):
    pipe = FocusDiTPipeline.from_pretrained(
        folder.parent,
        subfolder=folder.name,
        torch_dtype={"transformer": torch.bfloat16, "default": torch.float32},
        steps=7,
        vae=None,
    )
    assert (pipe.transformer.dtype, pipe.text_encoder.dtype) == (torch.bfloat16, torch.float32)
    assert pipe.config.steps == 7
    assert FocusDiTPipeline.from_pretrained(folder, vae=Vae("tiny").model).vae is not None


def test_a_device_map(folder):
    pipe = FocusDiTPipeline.from_pretrained(folder, device_map="cpu")
    assert {str(part.device) for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {"cpu"}
    assert same_pictures(draw(pipe), draw(FocusDiTPipeline.from_pretrained(folder)))


# ---- folders that are nearly the right one ----


def test_pickles_are_not_written(folder, tmp_path):
    pipe = FocusDiTPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="safe_serialization: only safetensors are written"):
        pipe.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()


def test_the_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert FocusDiTPipeline.from_pretrained(f"~/{folder.name}").config.resolution == 64


def test_a_whole_export_where_a_transformer_is_asked_for(folder):
    with pytest.raises(ValueError, match=r'is a whole export; give subfolder="transformer"'):
        FocusDiTTransformer2DModel.from_pretrained(folder)


def test_a_transformer_alone_where_an_export_is_asked_for(folder):
    """As `import_release` of 0.1.0 wrote it."""
    with pytest.raises(ValueError, match=r"is no export: .*; it is a transformer alone, as earlier versions imported"):
        FocusDiTPipeline.from_pretrained(folder / "transformer")
