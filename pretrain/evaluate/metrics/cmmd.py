"""cmmd: maximum mean discrepancy of CLIP embeddings from a reference's (arXiv 2401.09603); for fewer pictures than FID.

Letters: N, M pictures, E width of an embedding.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data_prep.common.paths import path, path_or_url
from pretrain.evaluate.clip import Clip
from pretrain.evaluate.features import Arrays, Reference, as_records, of_records
from pretrain.evaluate.metric import Picture, Record, Result, Value

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SIGMA, SCALE = 10.0, 1000.0  # the paper's
BLOCK = 4096  # embeddings of a block of the kernel's matrix, along each side: 134 MB in fp64


def arguments(parser: argparse.ArgumentParser) -> None:
    """The CLIP and the reference."""
    parser.add_argument(
        "--cmmd-model",
        type=path_or_url,
        help="CLIP: folder or name on the hub (paper: openai/clip-vit-large-patch14-336)",
    )
    parser.add_argument("--cmmd-reference", type=path, help="folder of pictures, or .npz or .npy of embeddings")


def check_prompts(args: argparse.Namespace) -> None:
    """It looks at no prompts."""


def build(args: argparse.Namespace, device: torch.device) -> CmmdScorer:
    """The CLIP, and the reference."""
    return CmmdScorer(Clip(args.cmmd_model, "--cmmd-model", device), args.cmmd_reference, args.out, device)


class CmmdScorer:
    """CLIP embeddings of pictures, and their discrepancy from the reference's."""

    batch = 32

    def __init__(self, clip: Clip, reference: Path | None, out: Path, device: torch.device):
        self._clip = clip
        self._device = device if device.type == "cuda" else "cpu"  # fp64
        self.identity: Mapping[str, Any] = {
            **clip.identity,
            "resize": f"the middle square, bicubic with antialiasing by Pillow, to {clip.size} x {clip.size}",
        }
        self._reference = Reference(
            "cmmd", reference, out, self, ("embeddings",), lambda features: {"embeddings": features}, self._check
        )

    def score(self, pictures: Sequence[Picture]) -> list[Record]:
        """Embeddings of length 1; pictures are made ready as the paper's code does it."""
        images = [middle_square(p.open(), self._clip.size) for p in pictures]
        return as_records(self._clip.pictures(images, do_resize=False, do_center_crop=False).cpu().numpy())

    def summarise(self, pictures: Sequence[Picture], records: Sequence[Record]) -> Result:
        """The paper's code's figure, and the unbiased estimate that its text describes."""
        import torch

        reference_ME = self._reference.arrays()["embeddings"]
        biased, unbiased = discrepancy(
            *(torch.from_numpy(a.astype(np.float64)).to(self._device) for a in (of_records(records), reference_ME))
        )
        n = len(records)
        values = {"cmmd": Value(biased, n)} | ({} if unbiased is None else {"unbiased": Value(unbiased, n)})
        return Result(values, {"reference": self._reference.about | {"count": len(reference_ME)}})

    def _check(self, arrays: Arrays) -> None:
        shape = arrays["embeddings"].shape
        if len(shape) != 2 or shape[1] != self._clip.width or not shape[0]:
            raise ValueError(f"embeddings are {shape}, expected (pictures, {self._clip.width}) of this CLIP")
        if not np.allclose(np.linalg.norm(arrays["embeddings"], axis=1), 1, atol=1e-2):
            raise ValueError("embeddings are not of length 1")


def middle_square(image: Image.Image, size: int) -> Image.Image:
    """The largest square in a picture's middle, `size` pixels along each side."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def discrepancy(x_NE: Tensor, y_ME: Tensor) -> tuple[float, float | None]:
    """1000 times the squared maximum mean discrepancy under exp(−|x − y|²/(2·10²)), in the precision of x and y.

    Returns:
        the biased estimate, which takes each picture's pair with itself for one of the pairs, and the unbiased one
        (Gretton et al. 2012, Eq. 5 and 3); None for the unbiased one of a single picture.
    """
    n, m = len(x_NE), len(y_ME)
    xx, yy, xy = kernel_sum(x_NE, x_NE), kernel_sum(y_ME, y_ME), kernel_sum(x_NE, y_ME)
    biased = SCALE * (xx / n**2 + yy / m**2 - 2 * xy / (n * m))
    if n < 2 or m < 2:
        return biased, None
    return biased, SCALE * (xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m))


def kernel_sum(x_NE: Tensor, y_ME: Tensor) -> float:
    """The sum over all pairs of exp(−|x − y|²/(2σ²)) − 1, by blocks.

    Without the ones, which cancel in a discrepancy and are zero for a picture and itself, no digits are lost.
    """
    total = 0.0
    for x_BE in x_NE.split(BLOCK):
        for y_CE in y_ME.split(BLOCK):
            squares_BC = (x_BE**2).sum(1)[:, None] + (y_CE**2).sum(1) - 2 * x_BE @ y_CE.T
            total += float((squares_BC.clamp_(min=0) / (-2 * SIGMA**2)).expm1_().sum())
    return total
