"""A run's checkpoint as a pipeline: what sampling, export and pruning start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.encoders import TextEncoder, Vae
from data_prep.schema import Card
from pretrain.checkpoint import reader as checkpoint
from pretrain.config import Config, kept_config
from pretrain.models import DiT
from pretrain.models.alignment import PREFIX
from pretrain.pipeline import FocusDiTPipeline, FocusDiTTransformer2DModel
from pretrain.recipes import Recipe, recipe_of
from pretrain.schedulers import build_scheduler


@dataclass(frozen=True)
class TrainedRun:
    """A trained model, and where it comes from."""

    pipeline: FocusDiTPipeline
    config: Config
    card: Card
    step: int
    images: int
    weights: str
    text: TextEncoder
    vae: Vae


def load_run(
    run: Path,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    recipe: Recipe | None = None,
    step: int | None = None,
) -> TrainedRun:
    """Reads a run directory's checkpoint of a step, by default the newest, in the dtypes of a recipe, by default plain.

    Args:
        weights: ema | master | another average, such as ema_0.999.

    Raises:
        ValueError, FileNotFoundError: no complete checkpoint, damaged files, weights that it does not have, or encoders other
            than the data set's.
    """
    device = torch.device(device)
    run = checkpoint.find_run(str(run))
    found = checkpoint.newest(run) if step is None else checkpoint.at_step(run, step)
    if found is None:
        raise ValueError(f"{run} has no complete checkpoint yet; train it first")
    found.verify()
    if weights not in (there := found.weights()):
        raise ValueError(
            f"--weights {weights}: {found.path} has {', '.join(there)} (optimizer.more_ema_decays adds averages)"
        )
    config = kept_config(run)
    card = Card.load(run)
    model = DiT(config.model.backbone())
    trained = found.parameters(weights).items()
    model.load_state_dict({name: values for name, values in trained if not name.startswith(PREFIX)})
    dtypes = (recipe or recipe_of("plain")).dtypes(device)
    default = dtypes.get("default")
    model.to(device, dtypes.get("transformer", default)).eval()
    text = TextEncoder.of(card.text_encoder, device, dtypes.get("text_encoder", default))
    vae = Vae.of(card.vae, device, dtypes.get("vae", default))
    p = config.preview
    pipeline = FocusDiTPipeline(
        text.tokenizer,
        text.model,
        vae.model,
        FocusDiTTransformer2DModel.of(model),
        build_scheduler(config.objective.name, p.shift),
        token_cap=card.token_cap,
        resolution=config.data.resolution,
        steps=p.steps,
        guidance=p.guidance,
        data_fingerprint=card.fingerprint,
        caption_dropout=config.data.caption_dropout,
    )
    return TrainedRun(pipeline, config, card, found.run_state.step, found.run_state.images, weights, text, vae)
