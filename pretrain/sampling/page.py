"""A sampling run as one HTML page that holds its pictures: opens without a server, can be sent as one file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class PageEntry:
    """One picture of a run; `masks` is the picture of its query masks, if they were kept."""

    prompt: str
    seed: int
    picture: Path
    masks: Path | None


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0 2rem; font-size: 13px; }
td { padding: .15rem 1rem .15rem 0; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1.5rem; align-items: start; }
main:has(details) { grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); }
figure { margin: 0; }
figure > img { width: 100%; height: auto; border-radius: 4px; }
figcaption { margin-top: .4rem; }
small { color: #666; }
details img { max-width: 100%; height: auto; }
"""


def page(title: str, settings: Mapping[str, object], entries: Sequence[PageEntry], left_out: int = 0) -> str:
    """The page's HTML. `left_out`: the number of the run's pictures that it does not hold."""
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in settings.items())
    more = f"<p>{left_out} more pictures are in the folder.</p>" if left_out else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n<table>{rows}</table>\n"
        f"<main>\n{''.join(_figure(e) for e in entries)}</main>\n{more}</body></html>\n"
    )


def _figure(entry: PageEntry) -> str:
    masks = ""
    if entry.masks is not None:
        image = _image(entry.masks, "query masks")
        masks = f"<details open><summary>query masks over blocks and steps</summary>{image}</details>"
    return (
        f"<figure>{_image(entry.picture, entry.prompt)}<figcaption>{escape(entry.prompt)}<br>"
        f"<small>seed {entry.seed} · {escape(entry.picture.name)}</small></figcaption>{masks}</figure>\n"
    )


def _image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(text)}">'
