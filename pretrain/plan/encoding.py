"""FLOPs of encoding captions and pictures once, by the encoders that a model's shape implies."""

from __future__ import annotations

# Parameters of the linear maps of a T5 encoder with gated GELU, by its width: Flan-T5's large, XL and XXL.
T5_PARAMETERS = {1024: 308_281_344, 2048: 1_157_627_904, 4096: 4_630_511_616}
# FLOPs for each pixel that is encoded, by the VAE's latent channels: a VAE of Stable Diffusion's size, and Mochi's as
# data_prep/mochi.py runs it. `tests/unit/plan/test_encoding.py` counts all of these.
VAE_FLOPS = {4: 4.16e6, 12: 2.47e6}

# Width of the features of an aligned stage, where the data set is not known: those of DINOv2's base, as REPA takes.
FEATURE_WIDTH = 768


def encoding_flops(resolutions: list[int], channels: int, text_width: int, tokens: float) -> float | None:
    """FLOPs of encoding one sample: 2 for each of T5's parameters and token, and the VAE's for each pixel; T5's attention over
    so short texts is left out. None where no encoder of this width or with these channels is known."""
    if text_width not in T5_PARAMETERS or channels not in VAE_FLOPS:
        return None
    return 2.0 * T5_PARAMETERS[text_width] * tokens + VAE_FLOPS[channels] * sum(side**2 for side in resolutions)
