"""An export of the authors' released weights, which names the encoders and draws by the recipe `release`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.encoders import DOWNSAMPLE
from data_prep.weights import parse_encoders
from pretrain.checkpoint.export_folder import new_folder, read_json
from pretrain.checkpoint.release_folder import load_release
from pretrain.models import DiT
from pretrain.models.release import SHIFT
from pretrain.pipeline import FocusDiTPipeline, FocusDiTTransformer2DModel
from pretrain.recipes import ReleaseRecipe
from pretrain.schedulers import build_scheduler


def write_release_export(transformer: Path, out: Path, encoders: str, ignore: Sequence[str] = ()) -> DiT:
    """Writes the folder `out`; returns its backbone.

    Args:
        transformer: the released transformer's folder.
        encoders: TEXT+VAE, as encode.py's `--encoders`; they are not loaded.
        ignore: unknown settings of the released config that shall not count.

    Raises:
        ValueError, OSError: the released folder or the names cannot serve, or `out` is there already.
    """
    names = dict(zip(("text_encoder", "vae"), parse_encoders(encoders), strict=True))
    found = {part: str(Path(name).resolve()) if Path(name).is_dir() else name for part, name in names.items()}
    with new_folder(out) as writing:
        model = load_release(transformer, ignore)
        size = read_json(transformer / "config.json")["sample_size"]
        FocusDiTPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=FocusDiTTransformer2DModel.of(model),
            scheduler=build_scheduler("flow", SHIFT),
            token_cap=ReleaseRecipe.tokens,
            resolution=DOWNSAMPLE * (size[0] if isinstance(size, list) else size),
            steps=ReleaseRecipe.steps,
            guidance=ReleaseRecipe.guidance,
            references={part: {"name": name, "fingerprint": None} for part, name in found.items()},
            recipe=ReleaseRecipe.name,
        ).save_pretrained(writing)
    return model
