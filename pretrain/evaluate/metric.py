"""What a metric is: a scorer that judges pictures one by one, and sums up what it found.

A scorer's judgement of a picture, its record, is kept on disk and valid for exactly this picture and this scorer, so that no
picture is judged twice. What a metric needs of a whole set, such as the features for FID, stands in the records, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

Record = dict[str, Any]
"""A scorer's judgement of one picture: values that JSON takes."""


class NotRun(Exception):
    """A metric cannot be had here: its package, weights or endpoint is missing. The message says which, and the mend."""


@dataclass(frozen=True)
class Picture:
    """A picture that is judged.

    Attributes:
        sha256: of its file's bytes.
        prompt, seed: what it was drawn from; None for pictures of other origin.
        about: the other fields of its prompt in a JSONL file of prompts.
    """

    path: Path
    sha256: str
    prompt: str | None = None
    seed: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> Image.Image:
        """The picture in RGB. Raises ValueError for a file that is no whole picture."""
        try:
            with Image.open(self.path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, UnidentifiedImageError) as error:
            raise ValueError(
                f"{self.path} cannot be read as a picture ({error}); remove it, or draw it anew"
            ) from error


@dataclass(frozen=True)
class Value:
    """A figure over some pictures.

    Attributes:
        sem: the standard error of a mean over pictures; None where the figure is no such mean.
        count: the pictures that it is of.
    """

    value: float
    count: int
    sem: float | None = None

    @classmethod
    def mean(cls, values: Sequence[float]) -> Value:
        """The mean of some values with its standard error; NaN of none."""
        n = len(values)
        if not n:
            return cls(float("nan"), 0)
        mean = sum(values) / n
        variance = sum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else None
        return cls(mean, n, None if variance is None else (variance / n) ** 0.5)


@dataclass(frozen=True)
class Result:
    """What a metric says of a set of pictures.

    Attributes:
        values: figures by name; the first is the metric's own.
        notes: what else has to be known, such as pictures that were refused, by name.
    """

    values: Mapping[str, Value]
    notes: Mapping[str, Any] = field(default_factory=dict)


class Scorer(Protocol):
    """A metric that is ready.

    Attributes:
        identity: all that its records depend on beside the picture and its prompt: library, version, hash of the weights, resize,
            settings. Records of another identity are not used.
        batch: pictures that it judges together.
    """

    identity: Mapping[str, Any]
    batch: int

    def score(self, pictures: Sequence[Picture]) -> list[Record]:
        """Judges pictures, a record each. Raises ValueError for a picture, or a field of its prompt, that it cannot take."""
        ...

    def summarise(self, pictures: Sequence[Picture], records: Sequence[Record]) -> Result:
        """Sums up the records of a set. Raises ValueError for a set that it cannot take."""
        ...


class Metric(Protocol):
    """Module of one metric: its docstring's first paragraph is its help; libraries are imported in `build`."""

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds its options, whose names begin with the metric's."""
        ...

    def check_prompts(self, args: argparse.Namespace) -> None:
        """Raises ValueError for prompts that it cannot take. Called first, so that no pictures are drawn in vain."""
        ...

    def build(self, args: argparse.Namespace, device: torch.device) -> Scorer:
        """The metric, ready. Raises NotRun where it cannot be had here, ValueError for other options that are wrong."""
        ...
