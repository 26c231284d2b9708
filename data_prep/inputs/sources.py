"""Sources of captioned pictures: one given by the command line, or several named ones in a YAML file.

    sources:
      coyo:
        tars: /data/coyo/*.tar                        # or *.parquet, a folder, a list of them; s3://, gs://, http(s):// too
        captions: {recaption: 0.8, .txt: 0.2}         # fields of key.json with weights, .txt is key.txt; default: one caption
        filter: aesthetic >= 5.5 and watermark < 0.5
      niji:
        tars: s3://bucket/niji/{00000..01023}.tar

Each source has its own folder in the data set, so that training can mix them in any proportions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.inputs.captions import CaptionChoice
from data_prep.inputs.filters import Filter
from data_prep.inputs.finder import find_inputs

DEFAULT_SOURCE = "images"  # name of the source that the command line gives
RESERVED = ("reports", "work")
UNUSABLE_PARTS = ("", ".", "..", "index.json")  # names that cannot be a part's folder, or that its set uses itself


@dataclass(frozen=True)
class Job:
    """A tar, a Parquet file or some pictures of a folder, and the part that it becomes; see `Found` for the fields."""

    source: Source
    part: str
    url: str
    bytes: int
    changed: str = ""
    files: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`source/part`, unique in the data set."""
        return f"{self.source.name}/{self.part}"


@dataclass(frozen=True)
class Source:
    """Named collection of tars, with the caption choice and filter for their samples."""

    name: str
    tars: tuple[str, ...]
    captions: CaptionChoice
    filter: Filter

    @property
    def choices(self) -> dict[str, Any]:
        """Settings that are the same for all parts of this source."""
        return {"captions": self.captions.setting, "filter": str(self.filter)}

    def jobs(self) -> list[Job]:
        """Returns a job for each input. Raises FileNotFoundError, or ValueError where two have the same name."""
        jobs: dict[str, Job] = {}
        for pattern in self.tars:
            for found in find_inputs(pattern):
                part, url = found.part, found.url
                if part in UNUSABLE_PARTS or part.encode(errors="ignore").decode() != part:
                    raise ValueError(
                        f"{url!r} would become the part {part!r}, which no folder can be called; rename it"
                    )
                if part in jobs and jobs[part].url != url:
                    raise ValueError(
                        f"{jobs[part].url} and {url} would both become the part {part} of {self.name}; rename one, or "
                        "make two sources of them"
                    )
                jobs[part] = Job(self, part, url, found.bytes, found.changed, found.files)
        return list(jobs.values())


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tars: str | list[str]
    captions: str | dict[str, float] | list[str] | None = None
    filter: str = ""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    sources: dict[str, _Entry]


def make_source(name: str, tars: list[str], captions: Any, filter_: str) -> Source:
    """Makes a source from its settings. Raises ValueError with one clear line."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name in RESERVED:
        raise ValueError(
            f"source {name!r}: a name has letters, digits, - and _ only, and is not {' or '.join(RESERVED)}"
        )
    return Source(name, tuple(tars), CaptionChoice.parse(captions), Filter.parse(filter_) if filter_ else Filter(()))


def read_sources(path: Path) -> list[Source]:
    """Reads the sources of a YAML file. Raises FileNotFoundError, or ValueError with every problem of the file."""
    if not path.is_file():
        raise FileNotFoundError(f"--sources {path}: no such file; data_prep/inputs/sources.py shows what it holds")
    try:
        content = _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        lines = [f"  {'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"{path}:\n" + "\n".join(lines)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    found, problems = [], []
    for name, entry in content.sources.items():
        try:
            tars = [entry.tars] if isinstance(entry.tars, str) else entry.tars
            found.append(make_source(name, tars, entry.captions, entry.filter))
        except ValueError as error:
            problems.append(f"  sources.{name}: {error}")
    if problems or not found:
        raise ValueError(f"{path}:\n" + ("\n".join(problems) or "  sources: there are none"))
    return found
