"""While training: pictures of fixed prompts with the averaged weights, and where the query masks look.

The prompts are encoded once, by the data set's own text encoder, and kept in the run directory, so that a restart needs no
text encoder. Each process draws its share; process 0 decodes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from data_prep.encoders import DOWNSAMPLE, TextEncoder, Vae
from data_prep.shards import Card, load_null_text
from pretrain.config import Config
from pretrain.ema import Ema
from pretrain.engine import World
from pretrain.models import DiT, PackedText
from pretrain.monitor import Monitor
from pretrain.pictures import labelled_grid, mask_map, to_image
from pretrain.pipeline import Sampling, generate


def read_prompts(path: Path) -> list[str]:
    """A prompt a line; empty lines do not count. Raises ValueError for a file without any."""
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file {path}")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts


def load_text_encoder(card: Card, device: torch.device) -> TextEncoder:
    """The data set's text encoder. Raises ValueError where it is not the one that encoded the data set."""
    encoder = TextEncoder(card.text_encoder["name"], device)
    _same("text encoder", card.text_encoder, encoder.fingerprint)
    return encoder


def load_vae(card: Card, device: torch.device) -> Vae:
    """The data set's VAE. Raises ValueError where it is not the one that encoded the data set."""
    vae = Vae(card.vae["name"], device)
    _same("VAE", card.vae, vae.fingerprint)
    return vae


def _same(what: str, about: dict, fingerprint: str) -> None:
    if about["fingerprint"] != fingerprint:
        raise ValueError(
            f"the {what} {about['name']} is not the one that encoded the data set: its fingerprint is "
            f"{fingerprint[:12]}, the card's is {about['fingerprint'][:12]}; put the same weights where the card says"
        )


class Preview:
    """Draws the preview prompts; nothing where `preview.every` is 0."""

    def __init__(self, config: Config, card: Card, world: World):
        p = config.preview
        self.config, self.card, self.world = config, card, world
        self.settings = Sampling(config.objective.name, p.steps, p.guidance, p.shift)
        self.vae: Vae | None = None
        if p.every:
            self.prompts = read_prompts(p.file())
            self.texts = self._encoded()
            self.null = PackedText.pack([load_null_text(config.data.path)])

    def _encoded(self) -> list[torch.Tensor]:
        """The prompts' embeddings, from the run directory, or encoded now by process 0."""
        words = "\n".join([self.card.fingerprint, *self.prompts])
        path = self.config.run_dir / f"preview_text_{hashlib.sha256(words.encode()).hexdigest()[:12]}.safetensors"
        if self.world.rank == 0 and not path.exists():
            encoder = load_text_encoder(self.card, self.world.device)
            texts = encoder.encode(self.prompts, self.card.token_cap)[0]
            save_file({f"{i:04d}": t for i, t in enumerate(texts)}, path)
        if self.world.size > 1:
            dist.barrier()
        return [t for _, t in sorted(load_file(path).items())]

    def due(self, step: int) -> bool:
        every = self.config.preview.every
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def draw(self, model: DiT, ema: Ema, monitor: Monitor, step: int) -> None:
        """Writes the sample grid and the first prompt's mask map. All processes call it."""
        mine = list(range(len(self.prompts)))[self.world.rank :: self.world.size]
        side = self.config.data.resolution // DOWNSAMPLE
        drawn = {}
        with ema.applied():
            if mine:
                text = PackedText.pack([self.texts[i] for i in mine])
                seeds = [self.config.preview.seed + i for i in mine]
                out = generate(model, text, self.null, seeds, (side, side), self.settings, keep_masks=True)
                masks = None if out.masks_BSKN is None else out.masks_BSKN[0]
                drawn = {i: out.latent_BCHW[k].cpu() for k, i in enumerate(mine)}
        everyone = [drawn]
        if self.world.size > 1:
            everyone = [{} for _ in range(self.world.size)]
            dist.all_gather_object(everyone, drawn)
        if self.world.rank != 0:
            return
        self.vae = self.vae or load_vae(self.card, self.world.device)
        latents = {i: latent for some in everyone for i, latent in some.items()}
        pictures = self.vae.decode(torch.stack([latents[i] for i in range(len(self.prompts))]))
        monitor.image("samples/ema", labelled_grid([to_image(p) for p in pictures], self.prompts, columns=4), step)
        if masks is not None:
            tokens = side // model.config.patch
            monitor.image("masks/first_prompt", mask_map(masks, (tokens, tokens), out.timesteps), step)
