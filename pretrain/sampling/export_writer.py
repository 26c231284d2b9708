"""An export: a trained run as a diffusers folder, with its encoders and a model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from pretrain.models.cost import count_parameters
from pretrain.sampling.trained_run import TrainedRun

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def write_export(trained: TrainedRun, out: Path, name: str, copy_encoders: bool, notes: str = "") -> None:
    """Writes an export into the folder `out`, which will be called `name`. `notes` go into the model card."""
    pipeline = trained.pipeline
    pipeline.transformer.save_pretrained(out / "transformer")
    pipeline.scheduler.save_pretrained(out / "scheduler")
    if copy_encoders:
        # The files themselves: what was loaded may have been rounded.
        _copy(trained.text.folder, out / "text_encoder", "config.json", *WEIGHT_FILES)
        _copy(trained.vae.folder, out / "vae", "config.json", *WEIGHT_FILES)
        pipeline.tokenizer.save_pretrained(out / "tokenizer")
    else:
        named = {"text_encoder": trained.card.text_encoder, "vae": trained.card.vae}
        references = {part: {k: about[k] for k in ("name", "fingerprint")} for part, about in named.items()}
        pipeline.register_modules(tokenizer=None, text_encoder=None, vae=None)
        pipeline.register_to_config(references=references)
    pipeline.save_config(out)
    (out / "training.json").write_text(json.dumps(_origin(trained), indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(model_card(trained, name, notes), encoding="utf-8")


def _copy(source: Path, target: Path, *patterns: str) -> None:
    target.mkdir()
    for pattern in patterns:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def _origin(trained: TrainedRun) -> dict:
    return {
        "run": trained.config.name,
        "weights": trained.weights,
        "step": trained.step,
        "images": trained.images,
        "data": {"fingerprint": trained.card.fingerprint, **asdict(trained.card)},
        "config": trained.config.model_dump(mode="json"),
    }


def model_card(trained: TrainedRun, name: str, notes: str = "") -> str:
    """README.md of an export."""
    pipeline, card = trained.pipeline, trained.card
    backbone, config = pipeline.transformer.dit.config, pipeline.config
    parameters = count_parameters(backbone).total
    weights = "last (not averaged)" if trained.weights == "master" else f"averaged ({trained.weights})"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [focusdit, diffusion-transformer]
---

# {trained.config.name}

A FocusDiT text-to-image diffusion transformer of {parameters / 1e6:.1f}M parameters, trained at {config.resolution} px for
{trained.step} steps ({trained.images} images); these are its {weights} weights.
{notes}
## Use

```python
from pretrain.pipeline import FocusDiTPipeline  # of the package focusdit-pretrain

pipe = FocusDiTPipeline.from_pretrained("{name}")
pipe("your prompt", height={config.resolution}, width={config.resolution}).images[0].save("picture.png")
```

or `DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)` of diffusers, since this folder's `pipeline.py` imports
that class; or

```
python -m pretrain.sample --model {name} --prompt "your prompt" --out samples
```

By default it takes {config.steps} steps at a guidance scale of {config.guidance}.
Prompts of more than {config.token_cap} tokens are cut.

## Training

| | |
|---|---|
| objective | {trained.config.objective.name} |
| backbone | width {backbone.width}, depth {backbone.depth}, query mask {backbone.mask}, FFN {backbone.ffn} |
| text encoder | {card.text_encoder["name"]} (`{card.text_encoder["fingerprint"][:12]}`) |
| VAE | {card.vae["name"]} (`{card.vae["fingerprint"][:12]}`) |
| data set | fingerprint `{card.fingerprint}`, {card.counts.get("written", "?")} samples |

The whole configuration, as in `training.json`:

```yaml
{yaml.safe_dump(trained.config.model_dump(mode="json"), sort_keys=False).rstrip()}
```
"""
