"""fid: distance from a reference's pictures, by the mean and covariance of InceptionV3's features (arXiv 1706.08500).

The network, its weights' layout and its resize are torch-fidelity's. Letters: N pictures, D features.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.common.files import sha256
from data_prep.common.paths import path
from pretrain.evaluate.features import Arrays, Reference, as_records, of_records
from pretrain.evaluate.metric import NotRun, Picture, Record, Result, Value

if TYPE_CHECKING:
    import torch

FEATURES = 2048  # the last pooling's; torch-fidelity's name for them is the number
BLOCK = 4096  # pictures of a covariance's partial sum


def arguments(parser: argparse.ArgumentParser) -> None:
    """The weights and the reference."""
    parser.add_argument("--fid-weights", type=path, metavar="FILE", help="torch-fidelity's weights-inception-….pth")
    parser.add_argument("--fid-reference", type=path, help="folder of pictures, or .npz with mu and sigma")


def check_prompts(args: argparse.Namespace) -> None:
    """It looks at no prompts."""


def build(args: argparse.Namespace, device: torch.device) -> FidScorer:
    """The network, and the reference."""
    if find_spec("torch_fidelity") is None:
        raise NotRun("the package torch-fidelity is missing; pip install 'focusdit-pretrain[evaluate]'")
    if args.fid_weights is None or not args.fid_weights.is_file():
        given = "no weights" if args.fid_weights is None else f"no file {args.fid_weights}"
        raise NotRun(f"{given}; fetch torch-fidelity's weights (docs/evaluation.md) and give --fid-weights FILE")
    return FidScorer(args.fid_weights, args.fid_reference, args.out, device)


class FidScorer:
    """InceptionV3's features of pictures; the Fréchet distance of their mean and covariance from the reference's."""

    batch = 32

    def __init__(self, weights: Path, reference: Path | None, out: Path, device: torch.device):
        self.identity: Mapping[str, Any] = {
            "library": "torch-fidelity",
            "version": version("torch-fidelity"),
            "weights": sha256(weights),
            "features": FEATURES,
            "resize": "bilinear as TensorFlow 1's, without antialiasing, to 299 x 299",
        }
        self._device, self._network = device, read_inception(weights).to(device)
        self._reference = Reference("fid", reference, out, self, ("mu", "sigma"), moments, check)

    def score(self, pictures: Sequence[Picture]) -> list[Record]:
        """Features; pictures of one size go through the network together."""
        import torch

        images = [np.asarray(p.open()) for p in pictures]
        features_ND = np.empty((len(images), FEATURES), np.float32)
        for size in sorted({image.shape for image in images}):
            places = [i for i, image in enumerate(images) if image.shape == size]
            pixels_BHWC = torch.from_numpy(np.stack([images[i] for i in places])).to(self._device)
            with torch.inference_mode():
                (found_BD,) = self._network(pixels_BHWC.permute(0, 3, 1, 2))
            features_ND[places] = found_BD.cpu().numpy()
        return as_records(features_ND)

    def summarise(self, pictures: Sequence[Picture], records: Sequence[Record]) -> Result:
        """The distance, in fp64."""
        n = len(records)
        if n < 2:
            raise ValueError("a covariance needs at least 2 pictures")
        found, reference = moments(of_records(records)), self._reference.arrays()
        about = self._reference.about
        notes: dict[str, Any] = {"reference": about}
        if n <= FEATURES or about.get("count", FEATURES + 1) <= FEATURES:
            notes["few pictures"] = (
                f"{n} pictures and {about.get('count', 'an unknown number')} in the reference for {FEATURES} features: a "
                "covariance is singular and the distance too large; compare it with such of the same counts only"
            )
        value = frechet_distance(found["mu"], found["sigma"], reference["mu"], reference["sigma"])
        return Result({"fid": Value(value, n)}, notes)


def read_inception(weights: Path) -> Any:
    """torch-fidelity's network, in evaluation mode. Raises ValueError for a file that does not hold its weights."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        # The library unpickles whatever the file holds; what passes here is tensors only.
        torch.load(weights, weights_only=True, map_location="cpu")
        return FeatureExtractorInceptionV3("inception", [str(FEATURES)], feature_extractor_weights_path=str(weights))
    except Exception as error:  # torch raises many kinds for other and damaged files
        raise ValueError(
            f"--fid-weights {weights}: not torch-fidelity's InceptionV3 ({str(error).splitlines()[0]}); fetch the file again"
        ) from error


def moments(features_ND: np.ndarray) -> Arrays:
    """`mu` [D] and `sigma` [D, D], the unbiased covariance, in fp64."""
    mu_D = features_ND.mean(axis=0, dtype=np.float64)
    sigma_DD = np.zeros((len(mu_D), len(mu_D)))
    for start in range(0, len(features_ND), BLOCK):
        centred_BD = features_ND[start : start + BLOCK] - mu_D
        sigma_DD += centred_BD.T @ centred_BD
    return {"mu": mu_D, "sigma": sigma_DD / max(len(features_ND) - 1, 1)}


def check(arrays: Arrays) -> None:
    """Raises ValueError for moments of other features."""
    mu, sigma = arrays["mu"].shape, arrays["sigma"].shape
    if mu != (FEATURES,) or sigma != (FEATURES, FEATURES):
        raise ValueError(f"mu is {mu} and sigma {sigma}, expected ({FEATURES},) and ({FEATURES}, {FEATURES})")
    if not (np.isfinite(arrays["mu"]).all() and np.isfinite(arrays["sigma"]).all()):
        raise ValueError("mu or sigma is not finite")


def frechet_distance(mu_a: np.ndarray, sigma_a: np.ndarray, mu_b: np.ndarray, sigma_b: np.ndarray) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2·(Σa·Σb)^½), squared as FID is reported.

    The trace of the root is the sum of the roots of the eigenvalues of Σa^½·Σb·Σa^½, which is symmetric: singular covariances
    need neither an offset nor complex numbers.
    """
    values_D, vectors_DD = np.linalg.eigh(sigma_a)
    root_DD = (vectors_DD * np.sqrt(values_D.clip(0))) @ vectors_DD.T
    shared_D = np.linalg.eigvalsh(root_DD @ sigma_b @ root_DD)
    trace = np.trace(sigma_a) + np.trace(sigma_b) - 2 * np.sqrt(shared_D.clip(0)).sum()
    return float(((mu_a - mu_b) ** 2).sum() + trace)
