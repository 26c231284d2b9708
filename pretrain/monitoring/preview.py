"""Preview while training: pictures of fixed prompts with the averaged weights, and a map of the query masks.

The prompts are encoded once, by the data set's own text encoder, and kept in the run directory, so that a restart needs no
text encoder. Each process draws some of the pictures; process 0 decodes them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from data_prep.common.files import permit_as_umask, temporary_name
from data_prep.encoders import DOWNSAMPLE, TextEncoder, Vae
from data_prep.pictures.grids import labelled_grid, to_image
from data_prep.schema import Card, load_null_text
from pretrain.compilation import eager_mode
from pretrain.config import Config
from pretrain.diffusion import Generated, Guidance, generate, start_noise
from pretrain.distributed.ema import Ema
from pretrain.distributed.world import World, all_gather, barrier
from pretrain.models import DiT, PackedText
from pretrain.monitoring.monitor import Monitor
from pretrain.sampling.pictures import mask_map
from pretrain.sampling.prompts import read_prompts


class Preview:
    """Draws the preview prompts every `preview.every` steps; 0 switches it off."""

    def __init__(self, config: Config, card: Card, data: Path, world: World):
        p = config.preview
        self.config, self.card, self.world = config, card, world
        self.vae: Vae | None = None
        if p.every:
            self.prompts = read_prompts(p.file())
            self.texts = self._embeddings()
            self.null = PackedText.pack([load_null_text(data)])

    def _embeddings(self) -> list[torch.Tensor]:
        """The prompts' embeddings [M, E] from the run directory; process 0 encodes them if they are not there yet."""
        words = "\n".join([self.card.fingerprint, *self.prompts])
        path = self.config.run_dir / f"preview_text_{hashlib.sha256(words.encode()).hexdigest()[:12]}.safetensors"
        if self.world.rank == 0 and not path.exists():
            encoder = TextEncoder.of(self.card.text_encoder, self.world.device)
            texts = encoder.encode(self.prompts, self.card.token_cap)[0]
            new = path.with_name(temporary_name(path.name))
            save_file({f"{i:04d}": t for i, t in enumerate(texts)}, new)
            permit_as_umask(new)
            new.replace(path)
        barrier(self.world)
        return [t for _, t in sorted(load_file(path).items())]

    def due(self, step: int) -> bool:
        """True where a preview follows step number `step`: every `preview.every` steps, and after the last one."""
        every = self.config.preview.every
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def draw(self, model: DiT, ema: Ema, monitor: Monitor, step: int) -> None:
        """Writes the sample grid and the first prompt's mask map, outside of the training's speed. All processes call it."""
        with monitor.paused(), eager_mode(self.config.model.compile):
            self._draw(model, ema, monitor, step)

    def _draw(self, model: DiT, ema: Ema, monitor: Monitor, step: int) -> None:
        mine = list(range(len(self.prompts)))[self.world.rank :: self.world.size]
        drawn = {}
        with ema.applied():
            if mine:
                out = self._generate(model, mine)
                masks = None if out.masks_BSKN is None else out.masks_BSKN[0]
                drawn = {i: out.latent_BCHW[k].cpu() for k, i in enumerate(mine)}
        everyone = all_gather(drawn, self.world)
        if self.world.rank != 0:
            return
        self.vae = self.vae or Vae.of(self.card.vae, self.world.device)
        latents = {i: latent for some in everyone for i, latent in some.items()}
        pictures = self.vae.decode(torch.stack([latents[i] for i in range(len(self.prompts))]))
        monitor.image("samples/ema", labelled_grid([to_image(p) for p in pictures], self.prompts, columns=4), step)
        if masks is not None:
            tokens = self.config.data.resolution // DOWNSAMPLE // model.config.patch
            monitor.image("masks/first_prompt", mask_map(masks, (tokens, tokens), out.timesteps), step)

    @torch.no_grad()
    def _generate(self, model: DiT, mine: list[int]) -> Generated:
        """Draws the latents of the prompts with these numbers."""
        from pretrain.schedulers import build_scheduler, set_timesteps  # late: diffusers takes a start half a second

        p, weight = self.config.preview, model.final.proj.weight
        side = self.config.data.resolution // DOWNSAMPLE
        noise = start_noise([p.seed + i for i in mine], (model.config.latent_channels, side, side)).to(weight.device)
        scheduler = build_scheduler(self.config.objective.name, p.shift)
        set_timesteps(scheduler, p.steps, weight.device)
        text = PackedText.pack([self.texts[i] for i in mine])
        was_training = model.training
        model.eval()
        try:
            encoded, null = (model.encode_text(t.to(weight.device, weight.dtype)) for t in (text, self.null))
            guidance = Guidance(p.guidance)
            times = model.embed_times(scheduler.timesteps)
            return generate(model, encoded, null, times, noise, scheduler, guidance, weight.dtype, keep_masks=True)
        finally:
            model.train(was_training)
