"""Mochi's VAE for pictures: without the work that its convolutions over time do in vain, and with exact Fourier features.

Letters: B pictures, C channels, T frames, H height, W width; O, I channels of a kernel, k its length in time.

diffusers' `AutoencoderKLMochi` is made for videos. Its 3-D convolutions are causal: they see copies of the first frame before it.
For a picture, a video of one frame, `for_pictures` makes use of this:

- Convolutions of one frame, which are all of the encoder's and the first 18 of the decoder's, see that frame alone: they are
  2-D convolutions with kernels summed over time.
- Behind them the decoder makes three frames of one, then six. There the first frame sees itself k times, and the second one sees
  the first k − 1 times: kernels are summed over these.
- Of the six frames the last one is the picture. The last convolutions make only the frames that it depends on.

Nothing is approximated, but sums are rounded in another order. Weights, their names, and results for videos stay as they are.

The encoder multiplies pixels by up to 2^7 · 2π and takes sines. In bf16, 8 bits of a pixel are left, which is a phase of up to a
quarter turn: pixels must come in fp32, and become what the weights are behind the sines.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLMochi
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from torch import Tensor, nn


def for_pictures(model: AutoencoderKLMochi) -> AutoencoderKLMochi:
    """Replaces parts of a frozen VAE in place (sums of its weights are kept); returns the model."""
    encoder, decoder, frames = model.encoder, model.decoder, 1
    if any(isinstance(module, FoldedConv) for module in encoder.modules()):
        return model
    encoder.proj_in.register_forward_pre_hook(_cast_features)
    _fold(encoder, frames)
    _fold(decoder.block_in, frames)
    for block in decoder.up_blocks:
        _fold(block, frames)
        frames *= block.temporal_expansion
    _fold(decoder.block_out, frames)
    if model.drop_last_temporal_frames:
        decoder.block_out = LastFrame(decoder.block_out.resnets, frames)
    return model


def _fold(module: nn.Module, frames: int) -> None:
    for name, child in list(module.named_modules()):
        if isinstance(child, CogVideoXCausalConv3d):
            module.set_submodule(name, FoldedConv(child, frames))


def _cast_features(reader: nn.Linear, given: tuple[Tensor]) -> tuple[Tensor]:
    return (given[0].to(reader.weight.dtype),)


class FoldedConv(nn.Module):
    """A causal convolution, with kernels of their own for the first of `frames` frames.

    Other numbers of frames are convolved as ever.
    """

    def __init__(self, causal: CogVideoXCausalConv3d, frames: int):
        super().__init__()
        self.conv, self.frames, self.copies = causal.conv, frames, causal.time_pad
        self.sides = causal.time_causal_padding[:4]
        self.fold()
        self.register_load_state_dict_post_hook(FoldedConv.fold)

    def fold(self, *_: object) -> None:
        """Sums the kernels: of frame t over the k − t times that it sees the first frame, as [O, I·(t + 1), height, width]."""
        weight_OIkhw = self.conv.weight.detach()
        for t in range(min(self.copies, self.frames)):
            first, rest = weight_OIkhw.split([self.copies + 1 - t, t], dim=2)
            kernel = torch.cat((first.sum(2, keepdim=True), rest), dim=2).flatten(1, 2)
            self.register_buffer(f"kernel_{t}", kernel, persistent=False)

    def forward(self, x_BCTHW: Tensor, conv_cache: None = None) -> tuple[Tensor, None]:
        """All frames, and no cache, as diffusers expects it."""
        if x_BCTHW.shape[2] == self.frames:
            return self.last(x_BCTHW, self.frames), None
        return self.conv(F.pad(x_BCTHW, (*self.sides, self.copies, 0), mode="replicate")), None

    def last(self, x_BCTHW: Tensor, count: int) -> Tensor:
        """The last `count` frames, from all frames or the last `count + copies` ones."""
        frames, parts = x_BCTHW.shape[2], []
        x_BCTHW = F.pad(x_BCTHW, (*self.sides, 0, 0), mode="replicate") if any(self.sides) else x_BCTHW
        for t in range(frames - count, min(self.copies, frames)):
            seen_BCHW = x_BCTHW[:, :, : t + 1].flatten(1, 2)
            kernel, stride = self.get_buffer(f"kernel_{t}"), self.conv.stride[1:]
            parts.append(F.conv2d(seen_BCHW, kernel, self.conv.bias, stride)[:, :, None])
        if frames > self.copies:
            parts.append(self.conv(x_BCTHW))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class LastFrame(nn.Module):
    """The decoder's last block, whose result is the last one of a picture's `frames` frames.

    Other numbers of frames all come out.
    """

    def __init__(self, resnets: nn.ModuleList, frames: int):
        super().__init__()
        self.resnets, self.frames = resnets, frames

    def forward(self, x_BCTHW: Tensor, conv_cache: None = None) -> tuple[Tensor, None]:
        """The last frame [B, C, 1, H, W], and no cache, as diffusers expects it."""
        picture, needed, resnets = x_BCTHW.shape[2] == self.frames, [1], cast(list[Any], self.resnets)
        for resnet in reversed(resnets):
            needed.insert(0, needed[0] + resnet.conv1.copies + resnet.conv2.copies)
        for resnet, count in zip(resnets, needed[1:], strict=True):
            x_BCTHW = _last_frames(resnet, x_BCTHW, count) if picture else resnet(x_BCTHW)[0]
        return x_BCTHW, None


def _last_frames(resnet: Any, x_BCTHW: Tensor, count: int) -> Tensor:
    """The last `count` frames, or all where there are fewer, of a `MochiResnetBlock3D`."""
    count = min(count, x_BCTHW.shape[2])
    between = min(count + resnet.conv2.copies, x_BCTHW.shape[2])
    h = x_BCTHW[:, :, -(between + resnet.conv1.copies) :]
    h = resnet.conv1.last(resnet.nonlinearity(resnet.norm1(h)), between)
    h = resnet.conv2.last(resnet.nonlinearity(resnet.norm2(h)), count)
    return x_BCTHW[:, :, -count:] + h
