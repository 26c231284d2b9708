"""The recipe `release` against the authors' way to a picture, written from its facts alone (release_double.py).

A small released model with the tiny encoders, in the release's own precisions. Two codes of bf16 round in other places, and
guidance enlarges that: the pictures are compared in the mean over their pixels, beside what each quirk makes of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from release_double import ReleasedFocusDiT, draw_as_released, write_release
from support import levels

from data_prep.encoders import TextEncoder, Vae
from pretrain import import_release, recipes, sample
from pretrain.models import DiTConfig
from pretrain.models.embeddings import rotary_positions
from pretrain.pipeline import FocusDiTPipeline, FocusDiTTransformer2DModel
from pretrain.recipes import RECIPES, Recipe, ReleaseRecipe, clean_caption, recipe_of
from pretrain.schedulers import build_scheduler

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "A Large red circle above a small BLUE square on a white background"
CPU = torch.device("cpu")
SHAPE = {"in_channels": 4, "caption_channels": 128, "num_layers": 3, "sample_size": [8, 8]}
FEW = {"steps": 6, "guidance": 1.5}


@dataclass(frozen=True)
class Released:
    """The authors' side in bf16, with the encoders, and the folder that our importer made of the same weights."""

    double: ReleasedFocusDiT
    text: TextEncoder
    vae: Vae
    folder: Path

    def draw(self, **more: Any) -> torch.Tensor:
        return draw_as_released(
            self.double, self.text.tokenizer, self.text.model, self.vae.model, PROMPT, 7, (8, 8), **more
        )


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    root = tmp_path_factory.mktemp("release")
    double = write_release(root / "transformer", **SHAPE)
    words = ["--transformer", str(root / "transformer"), "--out", str(root / "ours"), "--encoders", "tiny"]
    assert import_release.main(words) == 0
    encoders = TextEncoder("tiny", dtype=torch.bfloat16), Vae("tiny", dtype=torch.float32)
    return Released(double.bfloat16(), *encoders, root / "ours")


@pytest.fixture(scope="module")
def pipe(released: Released) -> FocusDiTPipeline:
    loaded = FocusDiTPipeline.from_pretrained(released.folder, torch_dtype=RECIPES["release"].dtypes(CPU))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def apart(picture: Image.Image, theirs: torch.Tensor) -> float:
    """The mean distance of two pictures, in 255ths."""
    return float(np.abs(np.asarray(picture).astype(float) - theirs.numpy().astype(float)).mean())


def draw(pipe: FocusDiTPipeline, **more: Any) -> Image.Image:
    return pipe(PROMPT, generator=torch.Generator().manual_seed(7), **more).images[0]


# ---- the authors' picture ----


def test_it_draws_the_authors_picture(pipe, released):
    """By the folder's own default and numbers: 30 steps at a guidance of 5.5."""
    assert pipe.config.recipe == "release"
    ours = draw(pipe)
    assert levels([ours]).std() > 20, "pictures of one grey would agree too"
    assert apart(ours, released.draw()) < 2


QUIRKS: dict[str, dict[str, Any]] = {
    "times": {"set_timesteps": lambda self, *a: Recipe().set_timesteps(*a)},
    "padding": {"encode": lambda self, *a: Recipe().encode(*a)},
    "negative prompt": {"negative_prompt": ""},
    "noise": {"latent_dtype": torch.float32},
}


def test_without_any_one_of_its_ways_it_is_another_picture(pipe, released, monkeypatch):
    theirs, asked = released.draw(**FEW), {"num_inference_steps": FEW["steps"], "guidance_scale": FEW["guidance"]}
    whole = apart(draw(pipe, **asked), theirs)
    assert whole < 2
    for name, changes in QUIRKS.items():
        monkeypatch.setitem(RECIPES, "without", type("Without", (ReleaseRecipe,), changes)())
        assert apart(draw(pipe, **asked, recipe="without"), theirs) > whole + 3, name
    plain = FocusDiTPipeline.from_pretrained(released.folder)
    assert apart(draw(plain, **asked, recipe="plain"), theirs) > whole + 3


# ---- each of its ways ----


def test_the_times_are_shifted_twice():
    scheduler = build_scheduler("flow", 3.0)
    ReleaseRecipe().set_timesteps(scheduler, 30, CPU)
    assert scheduler.sigmas[-4:].tolist() == pytest.approx([0.188, 0.104, 0.0089, 0], abs=5e-4)
    assert scheduler.timesteps[-1] == pytest.approx(8.93, abs=0.01)
    Recipe().set_timesteps(scheduler, 30, CPU)
    assert scheduler.sigmas[-4:].tolist() == pytest.approx([0.25, 0.176, 0.094, 0], abs=5e-4)


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        (PROMPT, PROMPT.lower()),
        ("a <b>Bold</b> move", "a bold move"),
        ("low quality, jpeg artifacts", "low quality, artifacts"),
        ("", ""),
    ],
)
def test_captions_are_cleaned(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_without_the_packages_of_the_cleaning(monkeypatch, pipe):
    monkeypatch.setattr(recipes, "is_ftfy_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs beautifulsoup4 and ftfy: pip install 'focusdit-pretrain\[release\]'"):
        draw(pipe)


def test_captions_are_padded_to_512_tokens(pipe):
    (text,) = pipe.encode_prompt([PROMPT])
    assert text.shape == (512, 128)
    tokens = len(pipe.tokenizer(PROMPT.lower()).input_ids)
    (alone,) = pipe.encode_prompt([PROMPT], recipe_of("plain"))
    assert len(alone) == tokens
    torch.testing.assert_close(text[:tokens].float(), alone.float(), rtol=2e-2, atol=2e-2)


def test_a_prompt_beyond_512_tokens_is_cut_and_keeps_its_end(pipe, released):
    text, cut = ReleaseRecipe().encode(pipe.tokenizer, pipe.text_encoder, "red circle " * 600, 300, CPU)
    assert len(text) == 512
    assert cut is not None and cut.endswith("red circle")
    ids = pipe.tokenizer("red circle " * 600, padding="max_length", max_length=512, truncation=True).input_ids
    assert ids[-1] == pipe.tokenizer.eos_token_id


def test_noise_is_drawn_and_latents_are_kept_in_bf16(pipe):
    drawn = draw_latents(pipe)
    assert drawn.dtype == torch.bfloat16
    start = torch.randn(1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.bfloat16)
    given = pipe(PROMPT, latents=start[:, :, 0], output_type="latent", num_inference_steps=2).images
    assert torch.equal(drawn, given)


def draw_latents(pipe: FocusDiTPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return pipe(PROMPT, generator=generator, output_type="latent", num_inference_steps=2).images


def test_latents_are_rounded_to_fp16_and_pixels_are_cut_off(released):
    vae, latent = released.vae.model, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    (picture,) = ReleaseRecipe().pictures(vae, latent, CPU, "pil")
    (exact,) = Recipe().pictures(vae, latent.half().float(), CPU, "np")
    np.testing.assert_array_equal(np.asarray(picture), (exact * 255).astype(np.uint8))
    (rounded,) = Recipe().pictures(vae, latent, CPU, "pil")
    assert (np.asarray(rounded).astype(int) - np.asarray(picture)).mean() == pytest.approx(0.5, abs=0.1)


def test_angles_are_rounded_to_the_tokens_precision():
    """The two tables lie 0.057 apart at 32 tokens a side."""
    release, thirds = (rotary_positions(kind, (32, 32), 96, 1.0, CPU, torch.bfloat16) for kind in ("release", "thirds"))
    assert (release.cos_Nd - thirds.cos_Nd).abs().max().item() == pytest.approx(0.057, abs=0.01)
    same = [rotary_positions(kind, (32, 32), 96, 1.0, CPU, torch.float32) for kind in ("release", "thirds")]
    assert torch.equal(same[0].sin_Nd, same[1].sin_Nd)


# ---- what cannot draw by it ----


def test_other_precisions_and_schedulers_are_refused(released, pipe):
    whole = FocusDiTPipeline.from_pretrained(released.folder)
    with pytest.raises(
        ValueError, match=r"the transformer computes in torch.bfloat16, but was loaded in torch.float32"
    ):
        draw(whole)
    other = FocusDiTPipeline(**pipe.components | {"scheduler": build_scheduler("epsilon", 1.0)}, recipe="release")
    with pytest.raises(
        ValueError, match=r"recipe release: it samples flow matching by .* not DPMSolverMultistepScheduler"
    ):
        draw(other)
    with pytest.raises(ValueError, match="recipe: 'theirs' is none of plain, release"):
        draw(pipe, recipe="theirs")


# ---- the commands ----


def test_the_importers_folder_is_sampled_by_the_command(released, tmp_path, pipe):
    words = ["--model", str(released.folder), "--prompt", PROMPT, "--seed", "7", "--steps", "2", "--out"]
    assert sample.main([*words, str(tmp_path / "a")]) == 0
    (line,) = (tmp_path / "a" / "prompts.jsonl").read_text().splitlines()
    settings = json.loads(line)["settings"]
    assert (settings["recipe"], settings["guidance"], settings["shift"]) == ("release", 5.5, 3.0)
    drawn = Image.open(tmp_path / "a" / json.loads(line)["file"])
    assert apart(drawn, torch.tensor(np.asarray(draw(pipe, num_inference_steps=2)))) < 0.5
    assert sample.main([*words, str(tmp_path / "b"), "--recipe", "plain"]) == 0
    (line,) = (tmp_path / "b" / "prompts.jsonl").read_text().splitlines()
    assert "recipe" not in json.loads(line)["settings"]


def test_another_recipe_is_another_setting(released, tmp_path, capsys):
    words = ["--model", str(released.folder), "--prompt", "a", "--steps", "1", "--out", str(tmp_path)]
    assert sample.main([*words, "--recipe", "plain", "--guidance", "5.5"]) == 0
    assert sample.main(words) == 1
    assert "was drawn with other settings (recipe None, now 'release')" in capsys.readouterr().err
    assert sample.main([*words, "--overwrite"]) == 0
    assert sample.main([*words, "--recipe", "plain", "--guidance", "5.5"]) == 1
    assert "(recipe 'release', now None)" in capsys.readouterr().err


def test_the_imported_folder_names_its_encoders(released, tmp_path):
    index = json.loads((released.folder / "model_index.json").read_text())
    assert index["references"] == {part: {"name": "tiny", "fingerprint": None} for part in ("text_encoder", "vae")}
    assert (index["token_cap"], index["resolution"], index["steps"], index["guidance"]) == (512, 64, 30, 5.5)
    alone = FocusDiTTransformer2DModel.from_pretrained(released.folder, subfolder="transformer")
    assert isinstance(alone.dit.config, DiTConfig) and alone.dit.config.rotary == "release"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"caption_channels": 10}, "tiny: its text embeddings are 128 wide, but this model was trained on 10; name"),
        ({"in_channels": 3}, "tiny: its latents have 4 channels, but this model was trained on 3; name"),
    ],
)
def test_encoders_of_another_width_are_refused(tmp_path, capsys, changes, said):
    write_release(tmp_path / "transformer", **SHAPE | changes)
    words = ["--transformer", str(tmp_path / "transformer"), "--out", str(tmp_path / "ours"), "--encoders", "tiny"]
    assert import_release.main(words) == 0
    assert sample.main(["--model", str(tmp_path / "ours"), "--prompt", "a", "--out", str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err


def test_a_wrong_spec_of_encoders_is_one_line(released, tmp_path, capsys):
    transformer = released.folder.parent / "transformer"
    words = ["--transformer", str(transformer), "--out", str(tmp_path / "ours"), "--encoders", "t5"]
    assert import_release.main(words) == 1
    assert "expected `tiny` or TEXT+VAE" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_the_commands_choices_are_the_recipes():
    """They stand in the parser by themselves, as help shall not wait for the libraries."""
    for name in RECIPES:
        assert sample.parse(["--model", "m", "--prompt", "a", "--out", "o", "--recipe", name]).recipe == name
