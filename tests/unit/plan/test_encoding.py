"""FLOPs of encoding against torch's counter on the encoders' shapes, without memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from data_prep.mochi import for_pictures
from pretrain.bench.picture import vae_of
from pretrain.plan.encoding import VAE_FLOPS, encoding_flops

# Flan-T5's large, XL and XXL: width, inner width, heads.
T5 = [(1024, 2816, 16), (2048, 5120, 32), (4096, 10240, 64)]


@pytest.mark.parametrize(("width", "inner", "heads"), T5)
def test_captions(width: int, inner: int, heads: int) -> None:
    config = T5Config(d_model=width, d_ff=inner, num_heads=heads, num_layers=24, feed_forward_proj="gated-gelu")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        T5EncoderModel(config)(torch.zeros(1, 80, dtype=torch.long))
    assert encoding_flops([], 4, width, 80) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("channels", VAE_FLOPS)
def test_pictures(channels: int) -> None:
    with torch.device("meta"):
        vae = vae_of(channels)
        if channels == 12:
            for_pictures(vae)
        frames = (1,) if channels == 12 else ()
        counted = []
        for side in (256, 512):
            with FlopCounterMode(display=False) as counter:
                vae.encode(torch.zeros(1, 3, *frames, side, side))
            counted.append(counter.get_total_flops())
            own = encoding_flops([side], channels, 4096, 0)
            assert own == pytest.approx(counted[-1], rel=0.03)
    assert encoding_flops([256, 512], channels, 4096, 0) == pytest.approx(sum(counted), rel=0.03)


def test_encoders_that_are_not_known() -> None:
    assert encoding_flops([256], 12, 768, 80) is None
    assert encoding_flops([256], 16, 4096, 80) is None
