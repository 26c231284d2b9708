"""One picture from embedded text to pixels, VAE decoding included: seconds and peak memory, beside the paper's on an H800.

Random weights: a backbone of the preset and diffusers' full-size Mochi VAE. The text encoder is left out, as it is idle while
sampling.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from diffusers import AutoencoderKL, AutoencoderKLMochi
from torch import nn

from data_prep.encoders import working_dtype
from pretrain.bench.timing import side_by_side
from pretrain.compilation import compile_for_sampling
from pretrain.models import DiT, DiTConfig, preset
from pretrain.pipeline import FocusDiTPipeline, FocusDiTTransformer2DModel
from pretrain.schedulers import build_scheduler

# The paper, "Model Size and Inference Cost": 20 steps on an H800.
PAPER = {256: "DiT 0.56 s, 5.9 GB; FocusDiT 0.922 s, 5.8 GB", 512: "DiT 0.72 s, 7.9 GB; FocusDiT 0.92 s, 7.9 GB"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--presets", nargs="+", default=["dit_1b", "focusdit_1b_shared2d"])
    parser.add_argument("--depth", type=int, default=0, help="blocks to build (0: the preset's own)")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", choices=("blocks", "graphs"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> str:
    """The table."""
    device = torch.device(args.device)
    dtype = working_dtype(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    lines = [f"{name}, {dtype}, {args.steps} steps, one picture with guidance, compile: {args.compile or 'none'}"]
    for side in args.resolutions:
        for chosen in args.presets:
            config = replace(preset(chosen), depth=args.depth) if args.depth else preset(chosen)
            pipe = pipeline_of(config, device, dtype)
            compile_for_sampling(pipe.transformer, pipe.transformer.dit, args.compile)
            text = torch.randn(1, 80, config.text_width, device=device, dtype=dtype)

            def draw(pipe: FocusDiTPipeline = pipe, text: torch.Tensor = text, side: int = side) -> None:
                null = text[:, :1]
                pipe(
                    height=side,
                    width=side,
                    num_inference_steps=args.steps,
                    prompt_embeds=text,
                    negative_prompt_embeds=null,
                )

            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            took = side_by_side({"draw": draw}, args.rounds, device)["draw"]
            memory = ""
            if device.type == "cuda":
                memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:6.1f} GiB"
            lines.append(f"  {side} px  {chosen:<22}{took:8.3f} s{memory}")
            del pipe
        if side in PAPER:
            lines.append(f"  {side} px  the paper, on an H800: {PAPER[side]}")
    return "\n".join(lines)


def pipeline_of(
    config: DiTConfig, device: torch.device, dtype: torch.dtype, vae: nn.Module | None = None
) -> FocusDiTPipeline:
    """A pipeline of random weights: a backbone of this shape, and by default the full-size VAE that its latents are from."""
    vae = vae or vae_of(config.latent_channels)
    dit = DiT(config).to(device, dtype).eval()
    vae = vae.to(device, dtype).eval()
    pipe = FocusDiTPipeline(None, None, vae, FocusDiTTransformer2DModel.of(dit), build_scheduler("flow", 3.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vae_of(channels: int, small: bool = False) -> nn.Module:
    """A VAE of random weights: Mochi's for 12 channels, else one of Stable Diffusion's size, or a small one."""
    if channels == 12 and not small:
        return AutoencoderKLMochi()
    widths = (32,) * 4 if small else (128, 256, 512, 512)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    return AutoencoderKL(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=widths,
        layers_per_block=1 if small else 2,
        latent_channels=channels,
    )
