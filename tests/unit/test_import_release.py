"""The importer of the authors' release, against a model written from the facts of the release alone (release_double.py)."""

import json
from pathlib import Path

import pytest
import torch
from release_double import ReleasedFocusDiT, write_release
from safetensors.torch import load_file, save_file

from pretrain import sample
from pretrain.checkpoint.export_folder import WEIGHTS
from pretrain.import_release import main
from pretrain.pipeline import FocusDiTTransformer2DModel

TIMES = torch.tensor([0.7, 500.9, 999.99])


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A small release, to be damaged."""
    write_release(tmp_path / "release")
    return tmp_path / "release"


def run(release: Path, out: Path, *words: str) -> int:
    return main(["--transformer", str(release), "--out", str(out), *words])


def compare(double: ReleasedFocusDiT, out: Path, rows: int = 8, columns: int = 20, tolerance: float = 1e-5) -> None:
    """Both models' predictions and masks, on a picture that is not square, at times between whole numbers."""
    ours = FocusDiTTransformer2DModel.from_pretrained(out, subfolder="transformer")
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(3, 3, 1, rows, columns, generator=generator)
    text = torch.randn(3, 1, 7, 10, generator=generator)
    with torch.no_grad():
        theirs = double(latent, text, TIMES)
        got = ours(latent[:, :, 0], text[:, 0], TIMES)
    assert (got.sample - theirs.prediction[:, :, 0]).norm() <= tolerance * theirs.prediction.norm()
    assert (got.query_masks - theirs.masks).norm() <= tolerance * theirs.masks.norm()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ffn": "uniform"},
        {"interpolation_scale_h": 2.0, "interpolation_scale_w": 2.0},
        {"interpolation_scale_h": None, "interpolation_scale_w": None, "sample_size": [15, 20]},
        {"sample_size": 12},
        {"norm_eps": 1e-2},
        {"patch_size": 1, "num_layers": 2, "in_channels": 3},
    ],
)
def test_equals_the_released_forward_pass(tmp_path: Path, changes):
    double = write_release(tmp_path / "release", **changes)
    assert run(tmp_path / "release", tmp_path / "ours") == 0
    compare(double, tmp_path / "ours")


def test_whole_and_broken_timesteps_share_the_masks_row(release, tmp_path):
    """The float timestep is truncated for the mask's table only."""
    assert run(release, tmp_path / "ours") == 0
    model = FocusDiTTransformer2DModel.from_pretrained(tmp_path / "ours", subfolder="transformer")
    for module in model.dit.modules():  # the time enters through the masks' tables alone
        if isinstance(module, type(model.dit.time_embed)):
            module.linear_2.weight.data.zero_()
    latent, text = torch.randn(1, 3, 8, 8), torch.randn(1, 4, 10)
    with torch.no_grad():
        first, same, other = (model(latent, text, t).query_masks for t in (500.0, 500.99, 501.0))
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)


def edit(release: Path, change) -> None:
    tensors = load_file(release / WEIGHTS)
    change(tensors)
    save_file(tensors, release / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("transformer_blocks.3.attn2.to_k.bias"), "missing transformer_blocks.3.attn2.to_k.bias"),
        (
            lambda t: t.pop("transformer_blocks.1.ff.net.0.proj.weight"),
            "missing transformer_blocks.1.ff.net.0.proj.weight",
        ),
        (lambda t: t.pop("scale_shift_table"), "missing scale_shift_table"),
        (lambda t: t.update({"pos_embed.extra": torch.zeros(2)}), "unknown pos_embed.extra"),
        (lambda t: t.update({"proj_out.weight": torch.zeros(12, 47)}), "proj_out.weight [12, 47] instead of [12, 48]"),
        (
            lambda t: t.update({"transformer_blocks.0.mgen_q.MLP.fc2.weight": torch.zeros(128, 512)}),
            "transformer_blocks.0.mgen_q.MLP.fc2.weight [128, 512] instead of [128, 513]",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(release, tmp_path, capsys, change, named):
    edit(release, change)
    assert run(release, tmp_path / "ours") == 1
    complaint = capsys.readouterr().err
    assert named in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_fn", "geglu"),
        ("attention_bias", False),
        ("cross_attention_dim", 64),
        ("norm_elementwise_affine", True),
        ("num_embeds_ada_norm", 100),
        ("out_channels", 6),
        ("patch_size_t", 2),
        ("use_rope", False),
        ("use_softmask", False),
        ("use_timestep", False),
        ("double_self_attention", True),
        ("downsampler", "k333_s222"),
        ("a_setting_of_tomorrow", 3),
        ("num_layers", None),
        ("use_q_mask", None),
        ("interpolation_scale_w", 2.0),
        ("interpolation_scale_h", None),
    ],
)
def test_other_settings_are_refused_by_name(release, tmp_path, capsys, key, value):
    config = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps({**config, key: value}))
    assert run(release, tmp_path / "ours") == 1
    assert f"{key}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "key",
    [
        "use_rope",
        "use_softmask",
        "use_timestep",
        "activation_fn",
        "attention_bias",
        "norm_type",
        "norm_elementwise_affine",
    ],
)
def test_a_missing_setting_is_refused_by_name(release, tmp_path, capsys, key):
    """Absent, the released code's own default would count, which is another model."""
    config = json.loads((release / "config.json").read_text())
    del config[key]
    (release / "config.json").write_text(json.dumps(config))
    assert run(release, tmp_path / "ours") == 1
    assert f"{key}: missing; the released model has " in capsys.readouterr().err


def test_null_scales_that_differ_are_refused(tmp_path, capsys):
    write_release(tmp_path / "release", interpolation_scale_h=None, interpolation_scale_w=None, sample_size=32)
    assert run(tmp_path / "release", tmp_path / "ours") == 1
    said = capsys.readouterr().err
    assert "rows are divided by 1.06667 and columns by 0.8" in said and said.count("\n") == 1
    assert "--ignore interpolation_scale_w takes the rows' for both" in said


def test_the_rows_scale_may_be_taken_for_both(tmp_path):
    """As the released code computes square pictures, whatever its columns' scale is."""
    double = write_release(tmp_path / "release", interpolation_scale_h=2.0, interpolation_scale_w=0.5)
    double.scale_w = double.scale_h
    assert run(tmp_path / "release", tmp_path / "ours", "--ignore", "interpolation_scale_w") == 0
    compare(double, tmp_path / "ours", rows=8, columns=8)


def test_an_unknown_setting_may_be_ignored(tmp_path):
    double = write_release(tmp_path / "release")
    config = json.loads((tmp_path / "release" / "config.json").read_text())
    (tmp_path / "release" / "config.json").write_text(json.dumps({**config, "a_setting_of_tomorrow": 3}))
    assert run(tmp_path / "release", tmp_path / "ours", "--ignore", "a_setting_of_tomorrow") == 0
    compare(double, tmp_path / "ours")


@pytest.mark.parametrize("damage", ["no folder", "no config", "cut", "pickle", "out is there"])
def test_bad_folders(release, tmp_path, capsys, damage):
    out, weights = tmp_path / "ours", release / WEIGHTS
    if damage == "no folder":
        release = tmp_path / "nowhere"
    elif damage == "no config":
        (release / "config.json").unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "pickle":
        weights.unlink()
        torch.save({}, release / "diffusion_pytorch_model.bin")
    else:
        out.mkdir()
    assert run(release, out) == 1
    expected = {
        "no folder": "no folder",
        "no config": "config.json cannot be read",
        "cut": "no whole safetensors file",
        "pickle": "diffusion_pytorch_model.bin is a pickle, which is never read",
        "out is there": "is there already",
    }
    assert expected[damage] in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.glob(".writing*")) == []


def test_the_whole_release_where_its_transformer_is_asked_for(tmp_path, capsys):
    write_release(tmp_path / "FocusDiT" / "transformer")
    assert run(tmp_path / "FocusDiT", tmp_path / "ours") == 1
    assert f"give its transformer folder, {tmp_path / 'FocusDiT' / 'transformer'}" in capsys.readouterr().err


def test_sampling_the_authors_folder_says_to_import_it(release, tmp_path, capsys):
    assert sample.main(["--model", str(release), "--prompt", "a", "--out", str(tmp_path / "out")]) == 1
    assert "it is the authors' transformer: import it with python -m pretrain.import_release" in capsys.readouterr().err
