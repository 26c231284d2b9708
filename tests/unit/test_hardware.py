"""docs/hardware.md's tables are what the project's functions compute.

`PYTHONPATH=tests:. python tests/unit/test_hardware.py` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from support import ROOT
from tables import with_tables

from data_prep.encoders import DOWNSAMPLE
from data_prep.schema import sample_bytes
from pretrain.config import load
from pretrain.models import PRESETS
from pretrain.models.cost import CAPTION, count_activations, count_parameters, grid_of
from pretrain.resilience.capacity import GIB, activation_bytes, kept_checkpoint_bytes, state_bytes

PAGE = ROOT / "docs/hardware.md"
MODELS = ("focusdit_1b_shared2d", "focusdit_1b", "focusdit_release", "dit_1b", "dit_xl2", "dit_b2", "dit_s2")
FLAN_T5_XXL, FLAN_T5_XL = 4096, 2048  # widths
MOCHI, SD = 12, 4  # latent channels


def gib(count: float) -> str:
    return f"{count / GIB:.1f}"


def memory() -> Iterator[str]:
    """Memory of a GPU by preset: ZeRO-2's states, and what one picture of a micro-batch adds."""
    pictures = "a picture at 256 px | with `recompute` | at 512 px | with `recompute`"
    yield f"| preset | parameters | states on 1 GPU | on 8 | on 32 | {pictures} |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in MODELS:
        config, deepspeed = load("stage1_256", [f"model.preset={name}"])
        shape = config.model.backbone()
        states = [gib(state_bytes(config, deepspeed, gpus)) for gpus in (1, 8, 32)]
        kept = [
            f"{count_activations(shape, grid_of(shape, side, DOWNSAMPLE), CAPTION, recompute=recompute) / 2**20:.0f} MiB"
            for side, recompute in product((256, 512), (False, True))
        ]
        cells = [f"`{name}`", f"{count_parameters(shape).total / 1e9:.3f}B", *states, *kept]
        yield f"| {' | '.join(cells)} |"


def stages() -> Iterator[str]:
    """The sum for the shipped stages, as their configs stand."""
    yield "| stage | micro-batch | states | activations | sum | on disk, all checkpoints that are kept |"
    yield "|---|---|---|---|---|---|"
    for name in ("stage1_256", "stage2_512", "stage3_finetune"):
        config, deepspeed = load(name)
        micro = deepspeed["train_micro_batch_size_per_gpu"]
        states, activations = state_bytes(config, deepspeed, 32), activation_bytes(config, micro)
        sums = [gib(states), gib(activations), gib(states + activations), gib(kept_checkpoint_bytes(config))]
        recompute = ", recompute" if config.model.recompute else ""
        yield f"| `{name}` on 32 GPUs | {micro}{recompute} | {' | '.join(sums)} |"


def disk() -> Iterator[str]:
    """Size of a million samples."""
    yield "| encoders | text | 256 px alone | 512 px alone | both resolutions of a sample |"
    yield "|---|---|---|---|---|"
    rows = (
        ("flan-t5-xxl + mochi", FLAN_T5_XXL, MOCHI),
        ("flan-t5-xl + mochi", FLAN_T5_XL, MOCHI),
        ("flan-t5-xxl + sd-ft-mse", FLAN_T5_XXL, SD),
    )
    for (name, width, channels), dtype in product(rows, ("bfloat16", "int8")):
        sizes = [
            sample_bytes(sides, channels, DOWNSAMPLE, width, CAPTION, dtype) for sides in ((256,), (512,), (256, 512))
        ]
        yield f"| {name} | {dtype} | {' | '.join(f'{n / 1e6:.2f} TB' for n in sizes)} |"


TABLES = {"memory": memory, "stages": stages, "disk": disk}


def test_the_tables_are_those_of_the_functions() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_tables(text, TABLES)
    assert f"captions of {CAPTION} tokens" in text


def test_the_widths_are_the_presets() -> None:
    assert PRESETS["focusdit_1b"].latent_channels == MOCHI and PRESETS["focusdit_1b"].text_width == FLAN_T5_XXL
    assert PRESETS["dit_xl2"].latent_channels == SD
    assert replace(PRESETS["dit_xl2"], width=PRESETS["dit_b2"].width, heads=12, depth=12) == PRESETS["dit_b2"]


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
