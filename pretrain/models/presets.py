"""The sizes table: every backbone that a config can name."""

from __future__ import annotations

from dataclasses import replace

from pretrain.models.config import DiTConfig
from pretrain.models.mixers.flexdit import FlexDiTSection
from pretrain.models.mixers.mediators import MediatorsSection

# The paper's baseline (§5): 28 blocks of 16 heads × 96 over Mochi latents (12 channels) and Flan-T5-XXL text (4096).
_DIT_1B = DiTConfig(width=1536, heads=16, depth=28, patch=2, latent_channels=12, text_width=4096)
# For a CPU: latents of the tiny VAE (4 channels), text of the tiny T5 (128). Absolute positions let it learn a layout in
# about half the steps that rotary positions alone need.
_DIT_TINY = DiTConfig(
    width=256,
    heads=4,
    depth=2,
    patch=4,
    latent_channels=4,
    text_width=128,
    absolute="sincos",
    mask_hidden=(64, 32, 16, 8),
)
# The published sizes of DiT (arXiv 2212.09748) and SiT over 4-channel latents, with captions instead of classes.
_DIT_XL2 = DiTConfig(width=1152, heads=16, depth=28, patch=2, latent_channels=4, text_width=4096)
_DIT_B2 = replace(_DIT_XL2, width=768, heads=12, depth=12)
_DIT_S2 = replace(_DIT_XL2, width=384, heads=6, depth=12)

PRESETS: dict[str, DiTConfig] = {
    "dit_1b": _DIT_1B,
    # The paper's text: the shared expert is 3D wide by default (Table 3, Eq. 5).
    "focusdit_1b": replace(_DIT_1B, mask="release", ffn="shared", shared_width=3),
    # The paper's parameter count, 1.023B, is that of a 2D wide shared expert.
    "focusdit_1b_shared2d": replace(_DIT_1B, mask="release", ffn="shared", shared_width=2),
    # What the authors released: no shared expert, a tapered vocabulary, positions in thirds.
    "focusdit_release": replace(_DIT_1B, mask="release", ffn="tapered", rotary="thirds"),
    "dit_xl2": _DIT_XL2,
    "dit_b2": _DIT_B2,
    "dit_s2": _DIT_S2,
    # FlexDiT as published (arXiv 2412.06028): its 512 px model with most tokens removed, and the splits at 256 px.
    "flexdit_xl2_512": replace(_DIT_XL2, density="flexdit", flexdit=FlexDiTSection(sparsity=(0.90, 0.96))),
    "flexdit_xl2_256": replace(_DIT_XL2, density="flexdit", flexdit=FlexDiTSection(split=(1, 4, 3, 3))),
    "flexdit_b2": replace(_DIT_B2, density="flexdit"),
    # Attention mediators as published (arXiv 2408.05710), one network for all three numbers.
    "mediators_s2": replace(_DIT_S2, attention="mediators"),
    "mediators_xl2": replace(_DIT_XL2, attention="mediators"),
    "dit_tiny": _DIT_TINY,
    # As many FLOPs in eight narrower blocks: enough for FlexDiT's kinds of blocks.
    "dit_tiny_deep": replace(_DIT_TINY, width=128, depth=8, mediators=MediatorsSection(numbers=(4, 16))),
    "focusdit_tiny": replace(_DIT_TINY, mask="adaln_single", ffn="shared", shared_width=2),
}


def preset(name: str) -> DiTConfig:
    """The named preset. Raises ValueError with the known names."""
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
