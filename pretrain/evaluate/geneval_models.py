"""What finds GenEval's objects and names their colours: a Mask2Former of transformers, and CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from einops import reduce
from PIL import Image
from torch.nn import functional as F

from data_prep.weights import local_folder
from pretrain.evaluate.clip import Clip
from pretrain.evaluate.geneval_rules import COLOURS, CONFIDENCE, Detection
from pretrain.evaluate.metric import NotRun
from pretrain.evaluate.weights import identity_of, read_model

# GenEval's names of COCO's classes, where a model calls them otherwise.
NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "sofa": "couch",
    "tvmonitor": "tv",
}
BACKGROUND = (153, 153, 153)  # around an object whose colour is asked
TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")


class Detector(Protocol):
    """Finds objects.

    Attributes:
        identity: all that its detections depend on beside the picture.
        labels: the classes that it knows, by GenEval's names.
    """

    identity: Mapping[str, Any]
    labels: frozenset[str]

    def detect(self, image: Image.Image) -> list[Detection]:
        """The objects in a picture above a confidence of 0.3."""
        ...


class ColourClassifier(Protocol):
    """Names the colours of objects."""

    identity: Mapping[str, Any]

    def colours(self, crops: Sequence[Image.Image], label: str) -> list[str]:
        """The colour of each cut-out object of a class, one of GenEval's ten."""
        ...


class Mask2Former:
    """Instance segmentation. Its scores are class times mask, as the published detector's."""

    def __init__(self, name: str, device: torch.device):
        """Args: name: folder or hub name. Raises NotRun where it cannot be loaded."""
        from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

        try:
            folder = local_folder(name, {})
            model = read_model(Mask2FormerForUniversalSegmentation, folder)
            self._processor: Any = Mask2FormerImageProcessor.from_pretrained(folder)
        except (OSError, ValueError, ImportError) as error:  # transformers wants SciPy for this model
            reason = " ".join(str(error).split())
            raise NotRun(f"--geneval-detector {name}: no Mask2Former that can be loaded ({reason})") from error
        self._model, self._device = model.to(device), device
        self._names = {i: NAMES.get(label, label) for i, label in model.config.id2label.items()}
        self.labels = frozenset(self._names.values())
        self.identity: Mapping[str, Any] = {**identity_of(folder), "processor": self._processor.to_dict()}

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> list[Detection]:
        """The objects in a picture above a confidence of 0.3."""
        inputs = self._processor(images=image, return_tensors="pt").to(self._device)
        (found,) = self._processor.post_process_instance_segmentation(
            self._model(**inputs),
            threshold=CONFIDENCE,
            target_sizes=[(image.height, image.width)],
            return_binary_maps=True,
        )
        masks_NHW = found["segmentation"].cpu().numpy() > 0  # without objects of another shape, and not read
        return [
            Detection(self._names[segment["label_id"]], segment["score"], box_of(mask_HW), mask_HW)
            for segment, mask_HW in zip(found["segments_info"], masks_NHW, strict=False)
        ]


def box_of(mask_HW: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def crop(image: Image.Image, detection: Detection) -> Image.Image:
    """An object by itself: cut out by its mask, on grey, within its box."""
    if detection.mask_HW is not None:
        mask = Image.fromarray(detection.mask_HW.astype(np.uint8) * 255)
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), mask)
    return image.crop(detection.box)


class ClipColours:
    """The colour whose descriptions CLIP finds nearest to an object."""

    def __init__(self, clip: Clip):
        self._clip = clip
        self.identity: Mapping[str, Any] = {**clip.identity, "resize": clip.resize}
        self._known: dict[str, torch.Tensor] = {}

    def colours(self, crops: Sequence[Image.Image], label: str) -> list[str]:
        """The colour of each cut-out object of a class."""
        if label not in self._known:
            texts = [t.format(colour=colour, label=label) for colour in COLOURS for t in TEMPLATES]
            by_colour = reduce(
                self._clip.captions(texts)[0], "(colour template) d -> colour d", "mean", colour=len(COLOURS)
            )
            self._known[label] = F.normalize(by_colour, dim=-1)
        nearest = (self._clip.pictures(crops) @ self._known[label].T).argmax(-1)
        return [COLOURS[i] for i in nearest.tolist()]
