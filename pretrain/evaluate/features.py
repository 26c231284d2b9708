"""Features of pictures, kept as records, and those of a reference that pictures are compared with.

A reference is a folder of pictures, or a file of what a metric needs of it. A folder's pictures are judged once, as others are:

    OUT/records/METRIC-reference-HASH/     their features
    OUT/reference/METRIC-HASH.npz          what the metric needs of them; it serves as a reference file elsewhere

Letters: N pictures, D features of a picture.
"""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.files import atomic_write, sha256
from pretrain.evaluate.metric import NotRun, Record, Scorer
from pretrain.evaluate.pictures import of_folder
from pretrain.evaluate.records import Records, fingerprint

Arrays = Mapping[str, np.ndarray]


def as_records(features_ND: np.ndarray) -> list[Record]:
    """Features as records: base64 of little-endian fp32."""
    return [{"features": base64.b64encode(row.astype("<f4").tobytes()).decode()} for row in features_ND]


def of_records(records: Sequence[Record]) -> np.ndarray:
    """Features [N, D] in fp32. Raises ValueError where one is not finite."""
    features_ND = np.stack([np.frombuffer(base64.b64decode(record["features"]), "<f4") for record in records])
    if not np.isfinite(features_ND).all():
        raise ValueError("features are not finite: the weights are damaged, or those of another model")
    return features_ND


class Reference:
    """What the pictures of a metric are compared with.

    Args:
        metric: its name; the option is --METRIC-reference.
        path: a folder, or a file with the arrays; None where none was given.
        needs: the names of the arrays. A .npy file is the first of them.
        reduce: makes the arrays of features [N, D].
        check: raises ValueError for arrays of other shapes than the metric's.

    Attributes:
        about: path, count (None where a file does not say it) and hash, for a result's notes.

    Raises:
        NotRun: no path was given.
        ValueError, OSError: there is nothing of use at the path.
    """

    def __init__(
        self,
        metric: str,
        path: Path | None,
        out: Path,
        scorer: Scorer,
        needs: Sequence[str],
        reduce: Callable[[np.ndarray], Arrays],
        check: Callable[[Arrays], None],
    ):
        self.option = f"--{metric}-reference"
        if path is None:
            raise NotRun(f"nothing to compare with; give {self.option} FOLDER or FILE.npz")
        self.scorer, self.needs, self.reduce, self.check, self._arrays = scorer, needs, reduce, check, None
        self.about: dict[str, Any] = {"path": str(path)}
        if not path.is_dir():
            self._arrays = self._read(path)
            self.about |= {"sha256": sha256(path)}
            return
        self._name = f"{metric} reference"
        self._found = of_folder(path, None, 1, self.option)
        self.about |= {"count": len(self._found.pictures), "sha256": self._found.sha256}
        key = fingerprint([dict(scorer.identity), self._found.sha256])[:12]
        self.cache = out / "reference" / f"{metric}-{key}.npz"
        if self.cache.exists():
            self._arrays = self._read(self.cache)
            return
        from pretrain.sampling.drawing import share_of_process  # late: the libraries take seconds

        self._records = Records(out, f"{metric}-reference", scorer.identity, share_of_process()[0])
        self._judge(self._found.mine)

    def arrays(self) -> Arrays:
        """The arrays; judges what other processes have left of a folder, and writes its file."""
        if self._arrays is None:
            pictures = self._found.pictures
            self._judge(range(len(pictures)))
            there = self._records.read(pictures)
            self._arrays = self.reduce(of_records([there[str(p.path)] for p in pictures]))
            self.check(self._arrays)
            buffer = io.BytesIO()
            about = {"scorer": dict(self.scorer.identity), "count": len(pictures)}
            np.savez(buffer, **self._arrays, about=np.array(json.dumps(about)))
            self.cache.parent.mkdir(exist_ok=True)
            atomic_write(self.cache, buffer.getvalue())
        return self._arrays

    def _judge(self, places: Sequence[int]) -> None:
        from pretrain.evaluate.evaluation import score  # late: it imports torch

        score(self._name, self.scorer, self._records, replace(self._found, mine=places))

    def _read(self, path: Path) -> Arrays:
        """A file's arrays. Raises ValueError where they are none, of other shapes, or made by another scorer."""
        try:
            loaded = np.load(path, allow_pickle=False)
            arrays = {self.needs[0]: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.option} {path}: no file of numpy ({error}); give a folder or FILE.npz") from error
        if missing := [name for name in self.needs if name not in arrays]:
            raise ValueError(
                f"{self.option} {path}: holds {', '.join(arrays) or 'nothing'}, but not {', '.join(missing)}; "
                f"expected a .npz with {' and '.join(self.needs)}"
            )
        try:
            self.check(arrays)
        except ValueError as error:
            raise ValueError(f"{self.option} {path}: {error}") from error
        if "about" not in arrays:
            self.about["made"] = "elsewhere: the file names neither library, weights nor resize"
            return arrays
        about = json.loads(str(arrays["about"]))
        self.about["count"] = about["count"]
        mine = dict(self.scorer.identity)
        if other := [
            f"{k} {about['scorer'].get(k)} (here {mine[k]})" for k in mine if about["scorer"].get(k) != mine[k]
        ]:
            raise ValueError(
                f"{self.option} {path}: made with another {'; '.join(other)}: figures of two scorers are not compared; "
                "make it anew from its folder"
            )
        return arrays
