"""Sampling: pictures from embedded text to pixels in 20 steps with guidance, eager, with compiled blocks, and as CUDA graphs.

Random weights; the VAE of Mochi's size. Beside published figures: FocusDiT's own on an H800, one picture; Nitro-E's throughput on
an MI300X, which is of another model and VAE: a mark, no comparison.
"""

from __future__ import annotations

import torch

from pretrain.bench.gpu.session import Numbers, Session
from pretrain.bench.picture import pipeline_of, vae_of
from pretrain.compilation import compile_for_sampling
from pretrain.pipeline import FocusDiTPipeline

PAPER = {256: 0.922, 512: 0.92}  # seconds a picture, FocusDiT, "Model Size and Inference Cost"
RECORD = {512: 18.8}  # pictures a second
# How the backbone computes, and whether one picture is drawn at once or many, in order of worth.
ORDER = ((None, 0), ("graphs", 0), (None, 1), ("blocks", 0), ("blocks", 1))


def run(session: Session) -> None:
    """Measures decoding, then drawing in each way and number."""
    shapes, compiled = session.shapes, "eager"
    pipe = _pipeline(session)
    session.measure("decoding alone", _decoding, pipe)
    for way, number in ORDER:
        if way and not session.cuda:
            continue  # a CPU would compile C++ for minutes
        if (way or "eager") != compiled:
            del pipe
            session.free()
            torch.compiler.reset()
            pipe, compiled = _pipeline(session), way or "eager"
            compile_for_sampling(pipe.transformer, pipe.transformer.dit, way)
        batch = shapes.batches[number]
        for resolution in shapes.micro:
            name = f"{resolution} px, {compiled}, {batch} at once"
            session.measure(name, _draw, pipe, resolution, batch, needs=25 if way else 5)


def _pipeline(session: Session) -> FocusDiTPipeline:
    config = session.shapes.focusdit
    with session.device:
        vae = vae_of(config.latent_channels, session.settings.small)
        return pipeline_of(config, session.device, session.dtype, vae)


def _draw(session: Session, pipe: FocusDiTPipeline, resolution: int, batch: int) -> Numbers:
    config, steps = pipe.transformer.dit.config, session.shapes.steps
    text = torch.randn(
        batch, min(80, session.shapes.caption[1]), config.text_width, device=session.device, dtype=session.dtype
    )

    def draw() -> None:
        pipe(
            height=resolution,
            width=resolution,
            num_inference_steps=steps,
            guidance_scale=4.5,
            prompt_embeds=text,
            negative_prompt_embeds=text[:1, :1],
            output_type="pt",
        )

    seconds = session.seconds(draw, rounds=1 if batch > 1 else 5, warm_up=1 if batch > 1 else 2)
    numbers = {"s a picture": seconds / batch, "pictures/s": batch / seconds}
    if batch == 1 and resolution in PAPER:
        numbers["the paper's s (H800)"] = PAPER[resolution]
    if batch > 1 and resolution in RECORD:
        numbers["a record's pictures/s (MI300X)"] = RECORD[resolution]
    return numbers | ({} if (peak := session.peak_gib()) is None else {"peak GiB": peak})


def _decoding(session: Session, pipe: FocusDiTPipeline) -> Numbers:
    from data_prep.encoders import decode_latents

    numbers = {}
    for resolution in session.shapes.micro:
        latent = session.latent(pipe.transformer.dit.config, 1, resolution).float()
        seconds = session.seconds(lambda z=latent: decode_latents(pipe.vae, z, session.device), rounds=3)  # type: ignore[misc]
        numbers[f"{resolution} px ms"] = 1e3 * seconds
    return numbers
