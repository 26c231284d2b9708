"""Makes the three small frozen encoders that ship with the package: `assets/tiny_t5`, `assets/tiny_vae` and `assets/tiny_vit`.

With them the whole pipeline runs on a CPU, without a download: a T5 encoder with its own tokenizer, an 8×8 AutoencoderKL,
and a vision encoder for `--features`. All learn from the captioned-shapes world (`shapes.py`) alone:

- the T5 encoder from captions: each position must predict its neighbours up to four words away, so that the embedding of
  "circle" tells that it is the red one;
- the autoencoder from pictures: L1 + MSE reconstruction of random crops, a small KL term, and no adversary. A loss term
  holds its first three latent channels to the picture's 8×8 averages. Without it the reconstruction is as good, but a small
  model learns the latents several times more slowly, as their fine structure is arbitrary;
- the vision encoder, a DINOv2 by its architecture, from pictures with the shape and the colour that each patch's centre shows.
  So it was told what it shall see, as DINOv2 was not. A linear map of its features tells objects from the background in 98% of
  the patches and colours in 98%, but hardly a circle from a square: 42% of the objects' patches.

About 30 minutes on two CPU cores; run it again only to change the encoders (every data set's fingerprint changes with them):

    python -m data_prep.assets.make_tiny_encoders            # or with --only t5, vae or vit
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from data_prep.encoders import DOWNSAMPLE, FEATURE_CELL, pixels_to_floats
from data_prep.shapes import COLOURS, SHAPES, Scene, draw, random_scene, scenes

ASSETS = Path(__file__).parent
NEIGHBOURS = 4  # predicted tokens on each side


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a Unigram tokenizer in T5's form: <pad> 0, </s> 1 (appended to each text), <unk> 2.

    Its pieces are the captions' words, by their log-probability, and single letters for all other words. A trained Unigram
    model splits most of these few words into letters, so that no token stands for a colour.
    """
    words = Counter(word for s in scenes(4000, seed=1) for word in s.caption.split())
    letters = ["▁", *(chr(c) for c in range(33, 127))]
    tokenizer = Tokenizer(
        models.Unigram(
            [
                *((piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")),
                *((f"▁{word}", math.log(n / words.total())) for word, n in sorted(words.items())),
                *((letter, -20.0) for letter in letters),
            ],
            unk_id=2,
        )
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def train_text_encoder(tokenizer: PreTrainedTokenizerFast, steps: int) -> T5EncoderModel:
    """Trains a T5 encoder of width 128 to predict each position's neighbours; `steps` of 64 captions."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    encoder = T5EncoderModel(config)
    offsets = [o for o in range(-NEIGHBOURS, NEIGHBOURS + 1) if o]
    heads = nn.Linear(config.d_model, len(offsets) * len(tokenizer))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    captions = (s.caption for s in scenes(steps * 64, seed=2))
    for step in range(steps):
        batch = tokenizer(list(itertools.islice(captions, 64)), padding=True, return_tensors="pt")
        hidden = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        logits = heads(hidden).unflatten(-1, (len(offsets), -1))
        targets = torch.stack([_shifted(batch.input_ids, o) for o in offsets], dim=-1)
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"text encoder: step {step}/{steps}, loss {loss.item():.4f}", flush=True)
    return encoder.eval()


def _shifted(ids_BL: Tensor, offset: int) -> Tensor:
    """Returns each position's token `offset` places on, 0 (ignored) past the ends."""
    length = ids_BL.shape[1]
    padded = F.pad(ids_BL, (NEIGHBOURS, NEIGHBOURS))
    return padded[:, NEIGHBOURS + offset : NEIGHBOURS + offset + length]


def random_crops(rng: random.Random, count: int, side: int) -> Tensor:
    """Returns crops [count, 3, side, side] in -1..1 of pictures drawn at 256 to 512 px, as data prep resizes them."""
    crops = []
    for _ in range(count):
        full = rng.choice([256, 320, 512])
        image = draw(random_scene(rng), full)
        left, top = rng.randrange(full - side + 1), rng.randrange(full - side + 1)
        crops.append(np.asarray(image.crop((left, top, left + side, top + side))))
    return pixels_to_floats(torch.from_numpy(np.stack(crops)), torch.device("cpu"))


def train_vae(steps: int) -> AutoencoderKL:
    """Trains an 8×8 AutoencoderKL of 4 latent channels, whose mean and std are in its config; `steps` of 8 crops of 96 px."""
    torch.manual_seed(0)
    rng = random.Random("vae")
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 16, 32, 48],
        layers_per_block=1,
        norm_num_groups=1,  # with more, flat colours are normalised away
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=256,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        pictures = random_crops(rng, 8, 96).to(memory_format=torch.channels_last)
        posterior = vae.encode(pictures).latent_dist
        output = vae.decode(posterior.sample()).sample
        reconstruction = F.l1_loss(output, pictures) + F.mse_loss(output, pictures)
        averages = F.mse_loss(posterior.mean[:, :3], F.avg_pool2d(pictures, DOWNSAMPLE))
        loss = reconstruction + averages + 2e-5 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(
                f"autoencoder: step {step}/{steps}, reconstruction {reconstruction.item():.4f}, averages {averages.item():.4f}",
                flush=True,
            )
    vae.eval()
    mean, std = latent_statistics(vae, rng)
    vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)
    return vae


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, rng: random.Random) -> tuple[list[float], list[float]]:
    """Returns each latent channel's mean and standard deviation over 64 pictures, by which data prep normalises."""
    latents = torch.cat([vae.encode(random_crops(rng, 8, 256)).latent_dist.sample() for _ in range(8)])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    return [round(v, 5) for v in mean.tolist()], [round(v, 5) for v in std.tolist()]


def shown_at(scene: Scene, cells: int) -> np.ndarray:
    """What the centres of cells × cells patches show: the shape (0 for none) and the colour, as numbers [2, cells²]."""
    y, x = np.divmod(np.arange(cells**2), cells)
    x, y = (x + 0.5) / cells, (y + 0.5) / cells
    colours = list(COLOURS)
    shape, colour = np.zeros(cells**2, dtype=int), np.full(cells**2, colours.index(scene.background))
    for o in scene.objects:
        dx, dy, r = x - o.x, y - o.y, o.radius
        inside = {
            "circle": np.hypot(dx, dy) <= r,
            "square": np.maximum(abs(dx), abs(dy)) <= r,
            "triangle": (abs(dy) <= r) & (abs(dx) <= (dy + r) / 2),
        }[o.shape]
        shape[inside], colour[inside] = 1 + SHAPES.index(o.shape), colours.index(o.colour)
    return np.stack([shape, colour])


def train_vision_encoder(steps: int) -> Dinov2Model:
    """Trains a ViT of width 64 to tell each patch's shape and colour; `steps` of 16 pictures of 256 px or 4 of 512 px."""
    torch.manual_seed(0)
    rng = random.Random("vit")
    encoder = Dinov2Model(
        Dinov2Config(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            mlp_ratio=2,
            image_size=256,
            patch_size=FEATURE_CELL,
        )
    )
    heads = nn.Linear(64, 1 + len(SHAPES) + len(COLOURS))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for step in range(steps):
        side, count = (512, 4) if step % 4 == 3 else (256, 16)
        drawn = [random_scene(rng) for _ in range(count)]
        pixels = torch.from_numpy(np.stack([np.asarray(draw(scene, side)) for scene in drawn]))
        target = torch.from_numpy(np.stack([shown_at(scene, side // FEATURE_CELL) for scene in drawn]))
        hidden = encoder(pixel_values=pixels_to_floats(pixels, torch.device("cpu"))).last_hidden_state[:, 1:]
        shape, colour = heads(hidden).split([1 + len(SHAPES), len(COLOURS)], dim=-1)
        loss = F.cross_entropy(shape.mT, target[:, 0]) + F.cross_entropy(colour.mT, target[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            right = (shape.argmax(-1) == target[:, 0]).float().mean().item()
            print(f"vision encoder: step {step}/{steps}, loss {loss.item():.4f}, shapes {right:.1%}", flush=True)
    return encoder.eval()


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Trains the small encoders that ship with the package.")
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--only", choices=("t5", "vae", "vit"), help="default: all three")
    parser.add_argument("--text-steps", type=int, default=1000)
    parser.add_argument("--vae-steps", type=int, default=3500)
    parser.add_argument("--vision-steps", type=int, default=1200)
    args = parser.parse_args()
    if args.only in (None, "t5"):
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(args.output / "tiny_t5")
        train_text_encoder(tokenizer, args.text_steps).to(torch.bfloat16).save_pretrained(args.output / "tiny_t5")
    if args.only in (None, "vae"):
        train_vae(args.vae_steps).to(torch.float16).save_pretrained(args.output / "tiny_vae")
    if args.only in (None, "vit"):
        train_vision_encoder(args.vision_steps).to(torch.float16).save_pretrained(args.output / "tiny_vit")
        half = [0.5, 0.5, 0.5]  # pixels in -1..1
        BitImageProcessor(image_mean=half, image_std=half).save_pretrained(args.output / "tiny_vit")


if __name__ == "__main__":
    main()
