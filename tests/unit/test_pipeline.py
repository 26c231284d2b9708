"""The pipeline and the transformer in diffusers' form, against the plain backbone and against themselves.

Letters: B images, C latent channels, L text tokens, S sampling steps, K blocks, N tokens.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import predict
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from support import draw_in_a_new_process, levels, same_pictures
from torch import Tensor

from data_prep.encoders import decode_latents
from pretrain.models import CachedConditioning, DiT, DiTConfig, PackedText, preset
from pretrain.models.mixers.flexdit import FlexDiTSection
from pretrain.models.mixers.mediators import MediatorsSection
from pretrain.pipeline import FocusDiTPipeline, FocusDiTTransformer2DModel
from pretrain.schedulers import FlowMatchEulerMaruyamaScheduler, build_scheduler

PROMPTS = [
    "a red circle",
    "a large green square above a small blue triangle on a white background",
    "",
    "a yellow triangle on the left",
]
STEPS = 3  # of `tiny_pipeline`, at 64 px


@pytest.fixture(scope="module")
def pipe(tiny_pipeline: FocusDiTPipeline) -> FocusDiTPipeline:
    return tiny_pipeline


@pytest.fixture
def loaded(tiny_pipeline_folder: Path) -> FocusDiTPipeline:
    """A pipeline of the test's own, to change."""
    pipeline = FocusDiTPipeline.from_pretrained(tiny_pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def plain() -> FocusDiTTransformer2DModel:
    """A backbone without query masks."""
    torch.manual_seed(0)
    return FocusDiTTransformer2DModel.of(DiT(preset("dit_tiny")).eval())


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def noise(*numbers: int, size: int = 8) -> Tensor:
    """What `seeds` begin with, for pictures of `size` latent pixels."""
    return torch.cat([torch.randn(1, 4, size, size, generator=g) for g in seeds(*numbers)])


def latents(pipe: FocusDiTPipeline, *args: Any, **kwargs: Any) -> Tensor:
    return pipe(*args, output_type="latent", **kwargs).images


# ---- the pipeline: what is drawn ----


def test_saved_and_loaded_in_a_new_process_it_draws_the_same_pixels(pipe, loaded, tiny_pipeline_folder, tmp_path):
    """Loaded weights lie as made ones do, here and in a new process with as many threads: the same bits."""
    there = draw_in_a_new_process(tiny_pipeline_folder, tmp_path, PROMPTS)
    here, saved = (p(PROMPTS, generator=seeds(0, 1, 2, 3)).images for p in (loaded, pipe))
    assert (levels(here) == levels(there)).all()
    assert (levels(saved) == levels(there)).all()
    assert torch.equal(*(latents(p, PROMPTS, generator=seeds(0, 1, 2, 3)) for p in (loaded, pipe)))
    assert levels(here).std() > 50, "pictures of one grey would agree too"


@pytest.mark.parametrize("size", [(None, None), (96, None), (None, 96), (96, 128), (128, 32)])
def test_sizes(pipe, size):
    height, width = (side or 64 for side in size)
    drawn = pipe("a red circle", height=size[0], width=size[1], num_inference_steps=1, output_query_masks=True)
    assert drawn.images[0].size == (width, height)
    assert drawn.query_masks.shape == (1, 1, 2, height * width // 32**2)
    assert pipe.latent_size(*size) == (height // 8, width // 8)


@pytest.mark.parametrize(("side", "nearest"), [(100, 96), (120, 128), (31, 32), (0, 32), (-64, 32), (65, 64)])
@pytest.mark.parametrize("name", ["height", "width"])
def test_a_size_that_does_not_divide_is_refused_with_the_nearest(pipe, name, side, nearest):
    with pytest.raises(ValueError, match=rf"^{name}: {side} px must be divisible by 32 .*; {nearest} is the nearest"):
        pipe("a red circle", **{name: side})


@pytest.mark.parametrize("batch", [1, 2])
def test_a_picture_does_not_depend_on_its_batch(pipe, batch):
    four = pipe(PROMPTS, generator=seeds(0, 1, 2, 3)).images
    parts: list[Image.Image] = []
    for i in range(0, len(PROMPTS), batch):
        parts += pipe(PROMPTS[i : i + batch], generator=seeds(*range(i, i + batch))).images
    assert same_pictures(four, parts)
    assert not same_pictures(four[:1], four[1:2])


def test_every_prompt_and_seed_counts(pipe):
    one = pipe(PROMPTS[:1], generator=seeds(0)).images
    assert not same_pictures(one, pipe(PROMPTS[:1], generator=seeds(1)).images)
    assert not same_pictures(one, pipe(["a blue circle"], generator=seeds(0)).images)


def test_one_generator_draws_the_noise_of_the_whole_batch(pipe):
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    drawn = latents(pipe, PROMPTS[:2], generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, latents(pipe, PROMPTS[:2], latents=start))
    assert not torch.equal(latents(pipe, "a red circle"), latents(pipe, "a red circle")), "without one, noise is fresh"


def test_latents_given_are_the_start(pipe):
    start = noise(5, 6)
    kept = start.clone()
    drawn = latents(pipe, PROMPTS[:2], latents=start)
    assert torch.equal(drawn, latents(pipe, PROMPTS[:2], generator=seeds(5, 6)))
    assert torch.equal(start, kept), "the caller's tensor is left alone"
    with pytest.raises(ValueError, match=r"latents: \(1, 4, 8, 8\), but \(2, 4, 8, 8\)"):
        pipe(PROMPTS[:2], latents=start[:1])


def test_wrong_numbers_of_generators(pipe):
    with pytest.raises(ValueError, match=r"1 generators for 2 pictures"):
        pipe(PROMPTS[:2], generator=seeds(0))


def padded(captions: list[Tensor], filler: float = 7.0) -> tuple[Tensor, Tensor]:
    """Embeddings [B, L, E] with `filler` where there is no token, and their mask [B, L]."""
    rows = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=filler)
    lengths = torch.tensor([len(c) for c in captions])
    return rows, (torch.arange(rows.shape[1]) < lengths[:, None]).long()


def test_prompt_embeds_are_the_prompts(pipe):
    embeds, mask = padded(pipe.encode_prompt(PROMPTS))
    null, null_mask = padded(pipe.encode_prompt(["a blue square"]))
    got = latents(
        pipe,
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=null,
        negative_prompt_attention_mask=null_mask,
        latents=noise(0, 1, 2, 3),
    )
    assert torch.equal(got, latents(pipe, PROMPTS, negative_prompt="a blue square", latents=noise(0, 1, 2, 3)))
    one = pipe.encode_prompt(PROMPTS[:1])[0][None]
    got = latents(pipe, prompt_embeds=one, latents=noise(0))
    assert torch.equal(got, latents(pipe, "a red circle", latents=noise(0)))


def test_negative_prompts(pipe):
    """The empty one by default; one for all equals it repeated; one per prompt acts on its own picture alone."""
    start = noise(0, 1)
    plain = latents(pipe, PROMPTS[:2], latents=start)
    assert torch.equal(plain, latents(pipe, PROMPTS[:2], negative_prompt="", latents=start))
    one = latents(pipe, PROMPTS[:2], negative_prompt="a blue square", latents=start)
    torch.testing.assert_close(one, latents(pipe, PROMPTS[:2], negative_prompt=["a blue square"] * 2, latents=start))
    each = latents(pipe, PROMPTS[:2], negative_prompt=["", "a blue square"], latents=start)
    torch.testing.assert_close(each, torch.stack([plain[0], one[1]]), rtol=1e-3, atol=1e-3)
    assert (plain - one).abs().flatten(1).amax(1).min() > 0.1
    with pytest.raises(ValueError, match="3 negative prompts for 2 prompts: give one, or one per prompt"):
        pipe(PROMPTS[:2], negative_prompt=["", "a", "b"])


def test_several_pictures_per_prompt(pipe):
    start, two, nulls = noise(0, 1, 2, 3), PROMPTS[:2], ["", "a blue square"]
    got = latents(pipe, two, negative_prompt=nulls, num_images_per_prompt=2, latents=start)
    spelled_out = [two[0], two[0], two[1], two[1]], [nulls[0], nulls[0], nulls[1], nulls[1]]
    assert torch.equal(got, latents(pipe, spelled_out[0], negative_prompt=spelled_out[1], latents=start))


def test_guidance_is_a_line_through_the_null_and_the_text(pipe):
    """One step from the same noise, at scales 0 (the null alone), 1 (the text alone) and 3; the scheduler is linear."""
    start = noise(0, 1)
    text = latents(pipe, PROMPTS[:2], guidance_scale=1.0, num_inference_steps=1, latents=start)
    null = latents(pipe, ["", ""], guidance_scale=1.0, num_inference_steps=1, latents=start)
    got = latents(pipe, PROMPTS[:2], guidance_scale=3.0, num_inference_steps=1, latents=start)
    torch.testing.assert_close(got, null + 3 * (text - null), rtol=1e-3, atol=1e-3)


def test_guidance_interval(pipe):
    """Times are 1, 6/7 and 3/5 (3 steps, shift 3)."""

    def drawn(*interval: float, **kwargs: Any) -> Tensor:
        return latents(pipe, PROMPTS[:2], guidance_interval=interval, latents=noise(0, 1), **kwargs)

    full, none = drawn(0, 1), drawn(0, 1, guidance_scale=1.0)
    assert torch.equal(full, latents(pipe, PROMPTS[:2], latents=noise(0, 1)))
    assert torch.equal(drawn(0.55, 1), full), "all times are inside"
    torch.testing.assert_close(
        drawn(0, 0.5), none, rtol=1e-3, atol=1e-3
    )  # no time is inside; the null text is read though
    parts = [drawn(0.95, 1), drawn(0.8, 0.9), drawn(0.5, 0.7), full, none]
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(parts) for b in parts[:i])
    for interval in ((0.9, 0.1), (-0.1, 1), (0, 1.1)):
        with pytest.raises(ValueError, match="guidance interval"):
            drawn(*interval)


def test_output_types(pipe):
    asked = {"prompt": PROMPTS[:2], "height": 32}

    def drawn(kind: str) -> Any:
        return pipe(**asked, generator=seeds(0, 1), output_type=kind).images

    latent, pt, array, pil = (drawn(kind) for kind in ("latent", "pt", "np", "pil"))
    assert (latent.shape, pt.shape, array.shape) == ((2, 4, 4, 8), (2, 3, 32, 64), (2, 32, 64, 3))
    assert latent.dtype == torch.float32
    decoded = decode_latents(pipe.vae, latent, torch.device("cpu"))
    torch.testing.assert_close(pt, (decoded + 1) / 2)
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(levels(pil), (array * 255).round())
    with pytest.raises(ValueError, match="output_type: 'jpeg' is none of pil, np, pt, latent"):
        drawn("jpeg")


def test_as_a_tuple(pipe):
    images, masks, work = pipe(
        "a red circle", generator=seeds(0), output_query_masks=True, skip_threshold=0.0, return_dict=False
    )
    assert levels(images).shape == (1, 64, 64, 3)
    assert masks.shape == (1, STEPS, 2, 4)
    assert work.kept_SK.shape == (STEPS, 2)


@pytest.mark.parametrize(
    ("arguments", "mend"),
    [
        ({}, "give either prompt or prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 128)}, "give either prompt or prompt_embeds"),
        ({"prompt": []}, "prompt: expected a text"),
        ({"prompt": ["a", 3]}, "prompt: expected a text"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps: 0 must be at least 1"),
        ({"prompt": "a", "skip_threshold": 1.5}, r"skip threshold 1.5 must be in 0\.\.1"),
        ({"prompt": "a", "skip_threshold": 0.5, "skip_unit": "row"}, "skip unit 'row' is none of token, layer"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["latents", "noise"]}, r"\['noise'\] are none of"),
    ],
)
def test_refusals(pipe, arguments, mend):
    with pytest.raises(ValueError, match=mend):
        pipe(**arguments)


def test_a_long_prompt_is_cut_with_a_warning(pipe, caplog):
    """The warning shows what was cut; what was cut has no say."""
    short = FocusDiTPipeline(**pipe.components, token_cap=6, resolution=32, steps=1)
    short.set_progress_bar_config(disable=True)
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, logger="pretrain.pipeline"):
            cut = latents(short, ["a red circle and much more behind it"], latents=noise(0, size=4))
            (record,) = caplog.records
            other = latents(short, ["a red circle and nothing"], latents=noise(0, size=4))
            caplog.clear()
            latents(short, ["a red"], latents=noise(0, size=4))
            assert caplog.records == []
    finally:
        diffusers_logging.disable_propagation()
    assert record.name == "pretrain.pipeline"
    assert "more than 6 tokens" in record.message
    assert "'d much more behind it'" in record.message
    assert torch.equal(cut, other)


# ---- the pipeline: what can be watched and changed ----


def test_the_callback_sees_every_step(pipe):
    seen: list[tuple[int, float, Tensor]] = []

    def watch(pipeline: Any, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipeline is pipe
        assert list(given) == ["latents"]
        seen.append((step, float(timestep), given["latents"].clone()))
        return given

    drawn = latents(pipe, PROMPTS[:2], generator=seeds(0, 1), callback_on_step_end=watch, num_inference_steps=4)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    torch.testing.assert_close([t for _, t, _ in seen], [1000 * 3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25)])
    assert torch.equal(seen[-1][2], drawn)
    assert torch.equal(drawn, latents(pipe, PROMPTS[:2], generator=seeds(0, 1), num_inference_steps=4))


def test_the_callback_can_change_the_latents(pipe):
    """Given the last latents of another drawing after the second step, it ends as that one does."""
    trail: list[Tensor] = []

    def keep(pipeline: Any, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        trail.append(given["latents"].clone())
        return {}

    def put(pipeline: Any, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": trail[1]} if step == 1 else given

    other = latents(pipe, "a red circle", generator=seeds(1), callback_on_step_end=keep)
    assert torch.equal(other, latents(pipe, "a red circle", generator=seeds(0), callback_on_step_end=put))


def test_the_callback_can_interrupt(pipe):
    trail: list[Tensor] = []

    def stop(pipeline: Any, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        trail.append(given["latents"].clone())
        pipeline.interrupt = step == 1
        return given

    drawn = pipe(
        "a red circle", generator=seeds(0), callback_on_step_end=stop, output_type="latent", output_query_masks=True
    )
    assert len(trail) == 2
    assert torch.equal(drawn.images, trail[1])
    assert drawn.query_masks.shape[1] == 2
    trail.clear()
    latents(pipe, "a red circle", callback_on_step_end=lambda *args: trail.append(args[3]["latents"]) or {})
    assert len(trail) == STEPS, "the next drawing is whole"


@pytest.mark.parametrize("unit", ["token", "layer"])
def test_skipping_under_0_is_no_skipping(pipe, unit):
    whole = pipe(PROMPTS, generator=seeds(0, 1, 2, 3))
    skipped = pipe(PROMPTS, generator=seeds(0, 1, 2, 3), skip_threshold=0.0, skip_unit=unit)
    assert np.abs(levels(whole.images) - levels(skipped.images)).max() <= 1
    assert whole.ffn_work is None
    assert skipped.ffn_work.tokens_SK[:, 0].tolist() == [4 * 2 * 4] * STEPS  # pictures × halves × tokens
    assert (skipped.ffn_work.kept_SK == 4 * 2 * 4).all()


@pytest.mark.parametrize("unit", ["token", "layer"])
def test_skipping_under_1_leaves_out_every_ffn(pipe, unit):
    """No mask is above 1, so it is the model whose FFNs give nothing."""
    skipped = pipe("a red circle", generator=seeds(0), skip_threshold=1.0, skip_unit=unit)
    assert (skipped.ffn_work.kept_SK == 0).all()
    assert not same_pictures(pipe("a red circle", generator=seeds(0)).images, skipped.images)


@pytest.mark.parametrize(("unit", "threshold"), [("token", 0.7), ("layer", 0.85)])
def test_the_work_counts_what_the_query_masks_keep(pipe, unit, threshold):
    drawn = pipe(
        PROMPTS,
        guidance_scale=1.0,
        generator=seeds(0, 1, 2, 3),
        skip_threshold=threshold,
        skip_unit=unit,
        output_query_masks=True,
    )
    masks_BSKN = drawn.query_masks
    if unit == "token":
        expected = (masks_BSKN > threshold).sum((0, 3))
    else:
        expected = (masks_BSKN.mean(-1) >= threshold).sum(0) * masks_BSKN.shape[-1]
    assert torch.equal(drawn.ffn_work.kept_SK, expected)
    assert 0 < expected.sum() < masks_BSKN.numel()
    assert drawn.ffn_work.tokens_SK[:, 0].tolist() == [4 * 4] * STEPS


def test_query_masks_are_those_of_the_pictures_with_text(pipe):
    masks_BSKN = pipe(PROMPTS, latents=noise(0, 1, 2, 3), output_query_masks=True).query_masks
    assert masks_BSKN.shape == (4, STEPS, 2, 4)
    assert 0 <= masks_BSKN.min() < masks_BSKN.max() <= 1
    embeds, mask = padded(pipe.encode_prompt(PROMPTS))
    first = pipe.transformer(noise(0, 1, 2, 3), embeds.float(), 1000.0, mask).query_masks
    torch.testing.assert_close(masks_BSKN[:, 0], first.transpose(0, 1), rtol=1e-4, atol=1e-5)
    assert pipe("a red circle").query_masks is None


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_offloading_draws_the_same_and_loads_each_model_in_turn(loaded, monkeypatch, guidance):
    """accelerate's real hooks, with the CPU as the device; the transformer is fetched before it reads the captions.

    What it fetches are copies, which lie as the loaded weights do: the same bits.
    """
    arguments = {"prompt": PROMPTS[:2], "guidance_scale": guidance}
    expected = loaded(**arguments, generator=seeds(0, 1)).images
    loaded.enable_model_cpu_offload(device="cpu")
    calls: list[str] = []
    hooks = {name: getattr(loaded, name)._hf_hook for name in ("text_encoder", "transformer", "vae")}
    for name, hook in hooks.items():
        monkeypatch.setattr(
            hook, "pre_forward", lambda *a, n=name, go=hook.pre_forward, **k: calls.append(n) or go(*a, **k)
        )
    assert (levels(loaded(**arguments, generator=seeds(0, 1)).images) == levels(expected)).all()
    texts = 1 if guidance == 1 else 2  # the null text is read where there is guidance only
    assert calls == ["text_encoder"] * (1 + texts) + ["transformer"] * (texts + 1 + STEPS) + ["vae"] * 2
    again = {name: getattr(loaded, name)._hf_hook for name in hooks}
    assert not set(again.values()) & set(hooks.values()), "all sent back, and hooked afresh for the next drawing"


def test_another_scheduler(pipe, loaded, tmp_path):
    loaded.scheduler = build_scheduler("epsilon", 1.0)
    got = loaded(PROMPTS[:2], generator=seeds(0, 1), num_inference_steps=4)
    assert len(loaded.scheduler.timesteps) == 4
    assert not same_pictures(got.images, pipe(PROMPTS[:2], generator=seeds(0, 1), num_inference_steps=4).images)
    alone = [loaded(PROMPTS[i], generator=seeds(i), num_inference_steps=4).images[0] for i in range(2)]
    assert same_pictures(got.images, alone)
    loaded.save_pretrained(tmp_path)
    again = FocusDiTPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, DPMSolverMultistepScheduler)
    assert (levels(again(PROMPTS[:2], generator=seeds(0, 1), num_inference_steps=4).images) == levels(got.images)).all()


def test_an_export_keeps_the_sde(pipe, loaded, tmp_path):
    loaded.scheduler = build_scheduler("flow", 3.0, "sde")
    got = latents(loaded, PROMPTS[:2], generator=seeds(0, 1))
    assert not torch.equal(got, latents(pipe, PROMPTS[:2], generator=seeds(0, 1)))
    alone = [latents(loaded, PROMPTS[i], generator=seeds(i)) for i in range(2)]
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path)
    again = FocusDiTPipeline.from_pretrained(tmp_path)
    assert (type(again.scheduler), again.scheduler.config.shift) == (FlowMatchEulerMaruyamaScheduler, 3.0)
    assert torch.equal(got, latents(again, PROMPTS[:2], generator=seeds(0, 1)))


def test_the_defaults_travel_with_the_folder(pipe, loaded):
    fields = ("token_cap", "resolution", "steps", "guidance", "references", "data_fingerprint")
    assert {f: loaded.config[f] for f in fields} == {f: pipe.config[f] for f in fields}
    assert (loaded.config.resolution, loaded.config.steps, loaded.config.guidance) == (64, STEPS, 3.0)


def test_in_bf16(tiny_pipeline_folder, pipe):
    half = FocusDiTPipeline.from_pretrained(tiny_pipeline_folder, torch_dtype=torch.bfloat16)
    assert {half.transformer.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.bfloat16}
    got, exact = (latents(p, PROMPTS[:2], generator=seeds(0, 1), guidance_scale=1.0) for p in (half, pipe))
    assert got.dtype == torch.float32
    assert (got - exact).norm() < 0.05 * exact.norm()


def test_without_query_masks(pipe, plain):
    """A plain DiT draws as well; it has nothing to show or to skip by."""
    pipeline = FocusDiTPipeline(**pipe.components | {"transformer": plain}, resolution=32, steps=1)
    drawn = pipeline("a red circle", output_query_masks=True)
    assert (drawn.images[0].size, drawn.query_masks) == ((32, 32), None)
    with pytest.raises(ValueError, match="no query masks"):
        pipeline("a red circle", skip_threshold=0.5)


# ---- the transformer ----


def texts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, 128, generator=generator) for n in lengths]


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(5, 1, 3), (4, 4, 4)])
def test_called_as_diffusers_transformers_are(pipe, lengths):
    """(latents, padded embeddings, timesteps, mask) to what the backbone makes of unpadded captions."""
    captions, timestep = texts(*lengths), torch.tensor([900.0, 40.0, 500.0])
    embeds, mask = padded(captions)
    given = None if len(set(lengths)) == 1 else mask
    got = pipe.transformer(noise(0, 1, 2), embeds, timestep, encoder_attention_mask=given)
    expected = predict(pipe.transformer.dit, noise(0, 1, 2), timestep, PackedText.pack(captions))
    assert torch.equal(got.sample, expected.sample_BCHW)
    assert got.query_masks.shape == (2, 3, 4)
    assert torch.equal(got.query_masks, expected.masks_KBN)
    for kind in (torch.bool, torch.float32):
        again = pipe.transformer(noise(0, 1, 2), embeds, timestep, mask.to(kind), return_dict=False)
        assert torch.equal(again[0], got.sample) and torch.equal(again[1][0][0], got.query_masks[0])


@torch.no_grad()
def test_one_timestep_for_all(pipe):
    embeds = torch.stack(texts(4, 4))
    expected = pipe.transformer(noise(0, 1), embeds, torch.tensor([250.0, 250.0])).sample
    for timestep in (250, 250.0, torch.tensor(250.0), torch.tensor([250.0])):
        assert torch.equal(pipe.transformer(noise(0, 1), embeds, timestep).sample, expected)


@torch.no_grad()
def test_caches_are_what_they_were_made_of(pipe):
    captions = texts(5, 1, 3)
    embeds, mask = padded(captions)
    (time,) = pipe.transformer.embed_times(torch.tensor([300.0]))
    conditioning = CachedConditioning(time, pipe.transformer.encode_text(PackedText.pack(captions)))
    got = pipe.transformer(noise(0, 1, 2), conditioning=conditioning)
    with pytest.raises(ValueError, match="give encoder_hidden_states and timestep, or conditioning"):
        pipe.transformer(noise(0, 1, 2), embeds)
    torch.testing.assert_close(got.sample, pipe.transformer(noise(0, 1, 2), embeds, 300.0, mask).sample)


@torch.no_grad()
def test_no_query_masks_are_none(plain):
    assert plain(noise(0), texts(3)[0][None], 300.0).query_masks is None


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "2MB"}])
def test_saved_and_loaded_bit_by_bit(pipe, tmp_path, options):
    pipe.transformer.save_pretrained(tmp_path, **options)
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists() == bool(options)
    again = FocusDiTTransformer2DModel.from_pretrained(tmp_path)
    assert again.dit.config == pipe.transformer.dit.config
    mine, others = pipe.transformer.state_dict(), again.state_dict()
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)
    assert not again.training


@torch.no_grad()
@pytest.mark.parametrize(
    ("mask", "attention", "density", "text_width"),
    [
        ("none", "full", "dense", 0),
        ("adaln_single", "mediators", "dense", 6),
        ("release", "full", "flexdit", 6),
        ("release", "mediators", "flexdit", 0),
    ],
)
def test_every_kind_of_backbone_saved_and_loaded(mask, attention, density, text_width, tmp_path):
    choices = {"mask": mask, "attention": attention, "density": density, "text_width": text_width}
    config = DiTConfig(
        width=16,
        heads=2,
        depth=6,
        patch=2,
        latent_channels=4,
        mediators=MediatorsSection((1, 4)),
        flexdit=FlexDiTSection(split=(1, 1, 1, 1)),
        mask_hidden=(8,),
        ffn="shared",
        **choices,
    )
    torch.manual_seed(0)
    dit = DiT(config).eval()
    for parameter in dit.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    FocusDiTTransformer2DModel.of(dit).save_pretrained(tmp_path)
    again = FocusDiTTransformer2DModel.from_pretrained(tmp_path)
    assert again.dit.config == config
    text = torch.randn(2, 3, 6)
    for timestep in (100.0, 900.0):
        given = noise(0, 1, size=12), timestep, PackedText.pack(list(text))
        expected = predict(dit, given[0], torch.full((2,), timestep), given[2])
        got = again(given[0], text, timestep)
        assert torch.equal(got.sample, expected.sample_BCHW)
        assert (got.query_masks is None) if mask == "none" else torch.equal(got.query_masks, expected.masks_KBN)


def test_diffusers_knows_every_kind_of_block():
    """It compiles them one by one, and never splits one between devices."""
    config = DiTConfig(
        width=16,
        heads=2,
        depth=6,
        patch=2,
        latent_channels=4,
        text_width=6,
        density="flexdit",
        flexdit=FlexDiTSection(split=(1, 1, 1, 1)),
    )
    for attention in ("full", "mediators"):
        names = {type(block).__name__ for block in DiT(replace(config, attention=attention)).blocks}
        assert names <= set(FocusDiTTransformer2DModel._repeated_blocks)
        assert names <= set(FocusDiTTransformer2DModel._no_split_modules)


def test_loaded_in_bf16(pipe, tiny_pipeline_folder):
    half = FocusDiTTransformer2DModel.from_pretrained(
        tiny_pipeline_folder, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    mine, others = pipe.transformer.state_dict(), half.state_dict()
    assert {tensor.dtype for tensor in others.values()} == {torch.bfloat16}
    assert all(torch.equal(mine[name].bfloat16(), others[name]) for name in mine)
