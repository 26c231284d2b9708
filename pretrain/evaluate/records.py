"""Records of a scorer, kept while it works: what is judged is never judged again.

    OUT/records/METRIC-HASH/00000.jsonl      one file for each process; a line for each picture

HASH is of the scorer's identity. A line that was cut off by a kill is not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.evaluate.metric import Picture, Record


class Records:
    """The records of one scorer on disk."""

    def __init__(self, out: Path, metric: str, identity: Mapping[str, Any], rank: int = 0):
        self.folder = out / "records" / f"{metric}-{fingerprint(identity)[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._own = self.folder / f"{rank:05d}.jsonl"

    def all(self) -> dict[tuple[str, str | None], Record]:
        """Every record that there is, by the picture's hash and prompt."""
        there: dict[tuple[str, str | None], Record] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # cut off by a kill
                    continue
                there[entry["sha256"], entry["prompt"]] = entry["record"]
        return there

    def read(self, pictures: Iterable[Picture]) -> dict[str, Record]:
        """The records that there are of these pictures, by the picture's path."""
        there = self.all()
        return {str(p.path): there[p.sha256, p.prompt] for p in pictures if (p.sha256, p.prompt) in there}

    def write(self, pictures: Sequence[Picture], records: Sequence[Record]) -> None:
        """Appends the records of some pictures; they are on disk when it returns."""
        entries = [
            {"picture": p.path.name, "sha256": p.sha256, "prompt": p.prompt, "record": r}
            for p, r in zip(pictures, records, strict=True)
        ]
        with self._own.open("ab") as file:
            # The first line break ends what a killed process may have left.
            file.write(b"\n" + "".join(json.dumps(e) + "\n" for e in entries).encode())


def fingerprint(value: Any) -> str:
    """The SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
