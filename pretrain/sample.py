"""Pictures from a trained run, with its averaged weights.

    python -m pretrain.sample --run runs/demo_512 --prompt "a large red circle on the left on a white background" --out samples

Writes one PNG per prompt (its number and a hash, never the prompt itself), `prompts.jsonl`, and a labelled grid.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from PIL import Image
from tqdm import tqdm

from data_prep.encoders import DOWNSAMPLE, TextEncoder, Vae
from data_prep.shards import Card, load_null_text
from pretrain import checkpoint
from pretrain.config import Config
from pretrain.models import DiT, PackedText
from pretrain.pictures import labelled_grid, to_image
from pretrain.pipeline import Sampling, generate
from pretrain.preview import load_text_encoder, load_vae, read_prompts
from pretrain.train import quiet


@dataclass(frozen=True)
class Trained:
    """All that draws pictures: a run's backbone, the encoders of its data set, and its configuration."""

    config: Config
    step: int
    card: Card
    model: DiT
    text: TextEncoder
    vae: Vae
    null: PackedText

    @classmethod
    def load(cls, run: Path, weights: str, device: torch.device) -> Trained:
        """Reads a run directory. `weights`: ema | master."""
        found = checkpoint.newest(checkpoint.find_run(str(run)))
        if found is None:
            raise ValueError(f"{run} has no complete checkpoint yet; train it first")
        found.verify()
        config = Config.model_validate(OmegaConf.to_container(OmegaConf.load(run / "config.yaml")))
        card = Card.load(run)
        model = DiT(config.model.backbone())
        model.load_state_dict(found.parameters(weights))
        model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
        null = PackedText.pack([load_null_text(run)])
        text, vae = load_text_encoder(card, device), load_vae(card, device)
        return cls(config, found.progress.step, card, model, text, vae, null)

    def sampling(self, steps: int | None = None, guidance: float | None = None, shift: float | None = None) -> Sampling:
        """The preview's settings, changed where given."""
        p = self.config.preview
        return Sampling(
            self.config.objective.name,
            p.steps if steps is None else steps,
            p.guidance if guidance is None else guidance,
            p.shift if shift is None else shift,
        )

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Sampling, batch: int
    ) -> Iterator[Image.Image]:
        """One picture per prompt at the stage's resolution."""
        side = self.config.data.resolution // DOWNSAMPLE
        bar = tqdm(total=len(prompts), unit="picture", disable=None)
        for i in range(0, len(prompts), batch):
            texts, cut = self.text.encode(prompts[i : i + batch], self.card.token_cap)
            if cut:
                tqdm.write(f"warning: {cut} prompts were cut to the data set's cap of {self.card.token_cap} tokens")
            text = PackedText.pack(texts)
            out = generate(self.model, text, self.null, seeds[i : i + batch], (side, side), settings)
            yield from (to_image(p) for p in self.vae.decode(out.latent_BCHW))
            bar.update(len(texts))
            if bar.disable:  # no terminal: plain lines
                print(f"{i + len(texts)} of {len(prompts)} pictures", flush=True)
        bar.close()


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    quiet()
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        print(f"sample: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> Path:
    """Draws and writes the pictures; returns the grid's path."""
    prompts = [*args.prompt, *(read_prompts(args.prompts) if args.prompts else [])]
    trained = Trained.load(args.run, args.weights, torch.device(args.device))
    settings = trained.sampling(args.steps, args.guidance, args.shift)
    seeds = [args.seed + i for i in range(len(prompts))]
    args.out.mkdir(parents=True, exist_ok=True)
    images = []
    with (args.out / "prompts.jsonl").open("w", encoding="utf-8") as about:
        for i, image in enumerate(trained.draw(prompts, seeds, settings, args.batch)):
            name = f"{i:06d}_{hashlib.sha256(prompts[i].encode()).hexdigest()[:8]}.png"
            image.save(args.out / name)
            about.write(json.dumps({"file": name, "prompt": prompts[i], "seed": seeds[i], "step": trained.step}) + "\n")
            images.append(image)
    grid = args.out / "grid.png"
    labelled_grid(images, prompts).save(grid)
    return grid


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draws pictures with a trained run.")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--prompt", action="append", default=[], help="a caption; may be given several times")
    parser.add_argument("--prompts", type=Path, help="file of captions, one a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; each next prompt has the next seed")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the config's preview.steps)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the config's preview.guidance)")
    parser.add_argument("--shift", type=float, help="shift of the times (default: the config's preview.shift)")
    parser.add_argument("--weights", choices=("ema", "master"), default="ema")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not args.prompt and not args.prompts:
        parser.error("give --prompt or --prompts")
    return args


if __name__ == "__main__":
    sys.exit(main())
