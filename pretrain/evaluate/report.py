"""Results of an evaluation: a JSON file for each metric, a table, a plot, and TensorBoard's curves of the run."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.common.command import program
from data_prep.common.files import atomic_write
from pretrain.evaluate.metric import Result
from pretrain.evaluate.pictures import PictureSet

LIBRARIES = ("torch", "transformers", "diffusers")


class Report:
    """Collects the metrics' results.

    Files: OUT/METRIC.json, OUT/table.md.
    """

    def __init__(self, args: argparse.Namespace, found: PictureSet):
        self.args, self.found = args, found

    def add(self, name: str, result: Result, identity: Mapping[str, Any]) -> None:
        """Writes a metric's result."""
        values = {key: asdict(value) for key, value in result.values.items()}
        self._write(name, {"status": "done", "values": values, "notes": dict(result.notes), "scorer": dict(identity)})

    def not_run(self, name: str, reason: str) -> None:
        """Writes why there is no result."""
        self._write(name, {"status": "not run", "reason": reason})

    def _write(self, name: str, about: Mapping[str, Any]) -> None:
        seeds = [p.seed for p in self.found.pictures if p.seed is not None]
        content = {
            "metric": name,
            **about,
            "pictures": {
                "count": len(self.found.pictures),
                "sha256": self.found.sha256,
                "seeds": [min(seeds), max(seeds)] if seeds else None,
                **self.found.origin,
            },
            "command": shlex.join([*program().split(), *sys.argv[1:]]),
            "versions": {library: version(library) for library in LIBRARIES},
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        atomic_write(self.args.out / f"{name}.json", json.dumps(content, indent=1) + "\n")

    def finish(self) -> str:
        """Writes the table of all results in OUT, also of earlier commands, and returns it."""
        results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.args.out.glob("*.json"))]
        text = table([r for r in results if "metric" in r], self.found.sha256)
        atomic_write(self.args.out / "table.md", text + "\n")
        return text


def table(results: list[dict[str, Any]], pictures: str) -> str:
    """Results in Markdown; those of other pictures than these are named below it."""
    lines, others = ["| metric | figure | value | ± SEM | pictures |", "|---|---|---|---|---|"], []
    for result in results:
        name = result["metric"]
        if result["pictures"]["sha256"] != pictures:
            others.append(name)
        elif result["status"] != "done":
            lines.append(f"| {name} | not run: {result['reason']} | | | |")
        else:
            lines += [_line(name, key, value) for key, value in result["values"].items()]
    if others:
        lines.append(
            f"\nOf other pictures, and not shown: {', '.join(others)}. Repeat them with --metrics {' '.join(others)}."
        )
    return "\n".join(lines)


def _line(metric: str, name: str, value: Mapping[str, Any]) -> str:
    sem = "" if value["sem"] is None else f"{value['sem']:.4f}"
    shown = "NaN" if math.isnan(value["value"]) else f"{value['value']:.4f}"
    return f"| {metric} | {name} | {shown} | {sem} | {value['count']} |"


def read(path: Path) -> dict[str, Any]:
    """A result that was written."""
    return dict(json.loads(path.read_text(encoding="utf-8")))
