"""Weights of frozen encoders: the names that `--encoders` and `--features` know, and the folder that a name leads to.

`--encoders` is `tiny` (both ship with the package) or `TEXT+VAE`, each a name of the tables below, a hub name, or a local
folder in transformers' or diffusers' layout; `--features` is one such name. Only safetensors are read: unpickling runs a
file's code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

ASSETS = Path(__file__).parent / "assets"
# A hub name may end in ":subfolder". Each of these repositories holds safetensors.
TEXT_ENCODERS = {
    "tiny": str(ASSETS / "tiny_t5"),
    "flan-t5-xxl": "google/flan-t5-xxl",
    "flan-t5-xl": "google/flan-t5-xl",
    "flan-t5-large": "google/flan-t5-large",
}
VAES = {
    "tiny": str(ASSETS / "tiny_vae"),
    "mochi": "genmo/mochi-1-preview:vae",
    "sd-ft-mse": "stabilityai/sd-vae-ft-mse",
    "sdxl": "stabilityai/sdxl-vae",
}
VISION_ENCODERS = {
    "tiny": str(ASSETS / "tiny_vit"),
    "dinov2-base": "facebook/dinov2-base",
    "dinov2-large": "facebook/dinov2-large",
    "dinov3-base": "facebook/dinov3-vitb16-pretrain-lvd1689m",
}
# Earlier names, whose repositories hold pickles alone.
PICKLED = {"t5-v1.1-xxl": "google/t5-v1_1-xxl"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
# Commands that read pickles and write safetensors, for text encoders, VAEs and vision encoders.
CONVERT_TEXT = (
    'python -c "from transformers import AutoTokenizer, T5EncoderModel; '
    "[kind.from_pretrained('{source}').save_pretrained('{target}') for kind in (T5EncoderModel, AutoTokenizer)]\""
)
CONVERT_VAE = (
    'python -c "from diffusers import AutoModel; '
    "AutoModel.from_pretrained('{source}', use_safetensors=False).save_pretrained('{target}')\""
)
CONVERT_VISION = (
    'python -c "from transformers import AutoImageProcessor, AutoModel; '
    "[kind.from_pretrained('{source}').save_pretrained('{target}') for kind in (AutoModel, AutoImageProcessor)]\""
)


def parse_encoders(spec: str) -> tuple[str, str]:
    """Splits `tiny` or `TEXT+VAE` into the two names. Raises ValueError for anything else."""
    if spec == "tiny":
        return "tiny", "tiny"
    text, plus, vae = spec.partition("+")
    if not plus or not text or not vae or "+" in vae:
        raise ValueError(
            f"--encoders {spec}: expected `tiny` or TEXT+VAE, for example flan-t5-xxl+mochi; known text encoders: "
            f"{', '.join(TEXT_ENCODERS)}; known VAEs: {', '.join(VAES)}; hub names and local folders serve too"
        )
    return text, vae


def local_folder(name: str, known: dict[str, str], **hub: Any) -> Path:
    """Returns the folder of weights, downloaded from the hub where it is not local.

    Args:
        known: short names, each with the folder or hub name that it stands for.
        hub: words of `huggingface_hub.snapshot_download`: revision, token, cache_dir, local_files_only, …

    Raises:
        FileNotFoundError: there are none, or the hub cannot be reached.
        ValueError: the repository holds no safetensors; the message has the command that makes them.
    """
    source = str(Path(known.get(name, name)).expanduser()) if name.startswith("~") else known.get(name, name)
    if known and name in PICKLED:
        raise ValueError(_without_safetensors(PICKLED[name], CONVERT_TEXT))
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise ValueError(
            f"{source} is a single file; give a folder in transformers' or diffusers' layout, with config.json beside the weights"
        )
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        names = f"a known name ({', '.join(known)})" if known else "a hub name"
        raise FileNotFoundError(f"no weights at {source}: neither {names} nor a local folder")
    repository, _, subfolder = source.partition(":")
    inside = f"{subfolder}/" if subfolder else ""
    patterns = [f"{inside}*.json", f"{inside}*.safetensors", f"{inside}*.model", f"{inside}*.jinja"]
    try:
        root = snapshot_download(repository, allow_patterns=patterns, **hub)
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileNotFoundError(
            f"{repository} could not be fetched from the hub ({reason}); give a local folder instead, or log in and "
            "check the network"
        ) from error
    folder = Path(root) / subfolder
    if not folder.is_dir():
        raise ValueError(
            f"{repository} has no folder {subfolder} with safetensors or JSON files; look for its name on the hub"
        )
    if known and not any(folder.glob("*.safetensors")):
        commands = ((TEXT_ENCODERS, CONVERT_TEXT), (VAES, CONVERT_VAE), (VISION_ENCODERS, CONVERT_VISION))
        convert = next(command for table, command in commands if table is known)
        raise ValueError(_without_safetensors(repository, convert, subfolder))
    return folder


def require_safetensors(folder: Path, convert: str) -> None:
    """Raises ValueError where a local folder's weights are pickles alone, with the command that converts them."""
    if not any(folder.glob("*.safetensors")) and any(path.suffix in PICKLES for path in folder.glob("*")):
        raise ValueError(_without_safetensors(str(folder), convert))


def _without_safetensors(source: str, convert: str, subfolder: str = "") -> str:
    target = f"models/{source.rstrip('/').rpartition('/')[2]}"
    inside = f"{source}', subfolder='{subfolder}" if subfolder else source
    return (
        f"{source} holds no safetensors but pickles, which are never read, since unpickling runs a file's code. If you trust "
        f"it, convert it once and give the new folder {target}: {convert.format(source=inside, target=target)}"
    )
