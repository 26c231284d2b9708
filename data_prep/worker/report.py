"""Reports of an encoding: read = written + dropped by reason, for each tar and in all.

    Tally            counts the samples of one tar, and gives its part's report
    summary          sums all parts' reports: `report.json`
    table            is the same for people: `report.txt`
    histograms       draws token lengths and picture sizes as PNG
    write_reports    writes all of these
    estimate         estimates the data set's size from the parts that are made

Reports do not depend on time, order or the number of workers: the same tars give the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import schema
from data_prep.common.files import temporary_name
from data_prep.common.storage import Remote
from data_prep.common.words import counted
from data_prep.inputs.contents import MAX_NAMES, Contents
from data_prep.inputs.finder import counted_inputs
from data_prep.inputs.sources import Job
from data_prep.worker.parts import PartWriter, part_reports
from data_prep.worker.report_notes import COUNTS, is_asked_for, notes, warnings

JSON, TEXT, TOKENS, SIZES = "report.json", "report.txt", "report_tokens.png", "report_sizes.png"
SIZE_STEP = 64  # pixels of a bin of the shorter side
_TARS_IN_TABLE = 1000


@dataclass
class Tally:
    """Counts of an input's samples.

    Attributes:
        expected: the number that img2dataset wrote, if it is known.
        contents: what the samples have, and whether the input is whole.
        captions: written samples by the field of their caption, or the member (`.txt`).
        unknown: tokens that the text encoder does not know, and captions with any.
    """

    job: Job
    read: int = 0
    captions_cut: int = 0
    expected: int | None = None
    contents: Contents = field(default_factory=Contents)
    captions: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    _dropped: list[tuple[int, dict[str, str]]] = field(default_factory=list)

    def drop(self, number: int, key: str, reason: str, detail: str) -> None:
        """Counts the sample `number` of the tar as dropped."""
        self._dropped.append((number, {"tar": self.job.url, "key": key, "reason": reason, "detail": detail}))

    def write(self, tokens: int, width: int, height: int) -> None:
        """Counts a sample as written; `width` and `height` are the original picture's, in pixels."""
        self.tokens[tokens] += 1
        self.sizes[min(width, height) // SIZE_STEP * SIZE_STEP] += 1

    def count_caption(self, caption_field: str, cut: bool, unknown_tokens: int) -> None:
        """Counts the caption of a sample that will be written."""
        self.captions[caption_field] += 1
        self.captions_cut += cut
        self.unknown["tokens"] += unknown_tokens
        self.unknown["captions"] += unknown_tokens > 0

    @property
    def reasons(self) -> dict[str, int]:
        """Dropped samples by reason, the most frequent first."""
        return dict(Counter(reject["reason"] for _, reject in self._dropped).most_common())

    @property
    def unwanted(self) -> int:
        """Number of samples that were dropped though neither a filter nor the search for duplicates asked for it."""
        return sum(n for reason, n in self.reasons.items() if not is_asked_for(reason))

    @property
    def dropped(self) -> int:
        """Number of samples dropped so far."""
        return len(self._dropped)

    def rejects(self) -> list[dict[str, str]]:
        """Returns the dropped samples in the tar's order."""
        return [reject for _, reject in sorted(self._dropped, key=lambda d: d[0])]

    def report(self, writer: PartWriter, stored: int) -> dict[str, Any]:
        """Returns the part's report; `stored` is the size of its shards in bytes."""
        assert self.read == sum(writer.written.values()) + self.dropped
        return {
            "tar": self.job.url,
            "tar_bytes": self.job.bytes,
            "tar_changed": self.job.changed,
            "incomplete": self.contents.incomplete,
            "expected": self.expected,
            "read": self.read,
            "written": dict(sorted(writer.written.items())),
            "sets": dict(sorted(writer.sets.items())),
            "dropped": dict(sorted(self.reasons.items())),
            "members": dict(self.contents.members),
            "fields": dict(self.contents.fields),
            "texts": dict(self.contents.texts),
            "captions": dict(sorted(self.captions.items())),
            "captions_cut": self.captions_cut,
            "unknown": {"tokens": self.unknown["tokens"], "captions": self.unknown["captions"]},
            "stored_bytes": stored,
            "column_bytes": dict(sorted(writer.bytes.items())),
            "text_error": writer.error("text"),
            **({"features_error": error} if (error := writer.error("features")) is not None else {}),
            "tokens": {str(k): v for k, v in sorted(self.tokens.items())},
            "sizes": {str(k): v for k, v in sorted(self.sizes.items())},
        }


def summary(parts: Iterable[tuple[str, Mapping[str, Any]]], card: schema.Card) -> dict[str, Any]:
    """Returns the sums over all parts, by source and in all, and an entry for each tar."""
    sources: dict[str, dict[str, Any]] = {}
    tars, everything = [], _empty_counts()
    for name, report in parts:
        for into in (everything, sources.setdefault(name.split("/")[0], _empty_counts())):
            into["tars"] += 1
            for key in ("read", "captions_cut", "stored_bytes", "tar_bytes"):
                into[key] += report[key]
            into["written"] += sum(report["written"].values())
            for key in ("dropped", "column_bytes", "tokens", "sizes"):
                for k, count in report[key].items():
                    into[key][k] = into[key].get(k, 0) + count
            for key in COUNTS:
                for k, count in report.get(key, {}).items():
                    there = into.setdefault(key, {})
                    there[k] = there.get(k, 0) + count
        everything["text_error"] = max(everything["text_error"] or 0, report["text_error"] or 0) or None
        if "features_error" in report:
            everything["features_error"] = max(everything.get("features_error", 0), report["features_error"])
        line = {k: report[k] for k in ("tar", "expected", "read", "written", "dropped")}
        tars.append({"part": name, **line, **({"incomplete": cut} if (cut := report.get("incomplete")) else {})})
    for into in (everything, *sources.values()):
        assert into["read"] == into["written"] + sum(into["dropped"].values())
        for key in ("dropped", *COUNTS):
            if key in into:
                most = sorted(into[key].items(), key=lambda item: (-item[1], item[0]))
                into[key] = dict(most[:MAX_NAMES] if key in ("members", "fields", "texts") else most)
        into["bytes_per_sample"] = _per_sample(into, card)
        for key in ("tokens", "sizes"):
            into[key] = dict(sorted(into[key].items(), key=lambda item: int(item[0])))
    return {**everything, "sources": sources, "parts": tars}


def _empty_counts() -> dict[str, Any]:
    counts: dict[str, Any] = dict.fromkeys(("tars", "read", "written", "captions_cut", "stored_bytes", "tar_bytes"), 0)
    return counts | {"text_error": None, "dropped": {}, "column_bytes": {}, "tokens": {}, "sizes": {}}


def _per_sample(counts: Mapping[str, Any], card: schema.Card) -> dict[str, float]:
    """Returns bytes per sample: as stored, and with captions padded to the cap in 16 bits instead."""
    if not counts["written"]:
        return {}
    text = sum(n for column, n in counts["column_bytes"].items() if column.startswith("text"))
    others = sum(counts["column_bytes"].values()) - text
    padded = card.token_cap * card.text_encoder["width"] * 2
    return {
        "stored": round(counts["stored_bytes"] / counts["written"], 1),
        "padded_fp16": round(others / counts["written"] + padded, 1),
    }


def card_counts(report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the card's counts from the report over all parts."""
    counts = {k: report[k] for k in ("read", "written", "dropped", "captions_cut", "bytes_per_sample")}
    return {"parts": len(report["parts"]), **counts}


def table(report: Mapping[str, Any], card: schema.Card) -> str:
    """Returns the report as text. Of more than a thousand tars, those with the largest dropped shares are listed."""
    dropped = sum(report["dropped"].values())
    inputs = counted_inputs([part["tar"] for part in report["parts"]])
    lines = [f"read {report['read']} = written {report['written']} + dropped {dropped}, from {inputs}", ""]
    if len(report["sources"]) > 1:
        lines += [
            f"  {name:<20} read {s['read']:>11} = written {s['written']:>11} + dropped {sum(s['dropped'].values()):>10}"
            for name, s in report["sources"].items()
        ]
        lines.append("")
    lines += [
        f"  {reason:<40} {count:>11} {count / report['read']:>8.2%}" for reason, count in report["dropped"].items()
    ]
    if report["captions_cut"]:
        lines.append(f"  {report['captions_cut']} captions were cut to {card.token_cap} tokens")
    lines += notes(report, card)
    if report["written"]:
        per = report["bytes_per_sample"]
        lines.append(
            f"\n{size_text(report['stored_bytes'])} on disk: {per['stored']:,.0f} bytes per sample; captions padded to "
            f"{card.token_cap} tokens in 16 bits would make it {per['padded_fp16']:,.0f}"
        )
        total = sum(report["column_bytes"].values())
        lines += [f"  {c:<20} {size_text(n):>12} {n / total:>8.2%}" for c, n in report["column_bytes"].items()]
        if report["text_error"]:
            lines.append(f"  8-bit text differs from 16 bits by {report['text_error']:.2%} (root mean square)")
        if "features_error" in report:
            lines.append(f"  8-bit features differ from 16 bits by {report['features_error']:.2%} (root mean square)")
    lines += ["", *(f"WARNING: {line}" for line in found)] if (found := warnings(report, card)) else []
    parts = report["parts"]
    if len(parts) > _TARS_IN_TABLE:
        parts = sorted(parts, key=lambda p: -sum(p["dropped"].values()) / max(1, p["read"]))[:_TARS_IN_TABLE]
    lines += ["", f"{'part':<32} {'read':>9} {'written':>9} {'dropped':>9}"]
    for part in parts:
        reasons = ", ".join(f"{reason} {count}" for reason, count in part["dropped"].items())
        wanted = part["expected"]
        if wanted is not None and wanted != part["read"]:
            reasons += f"  (img2dataset wrote {wanted})"
        counts = part["read"], sum(part["written"].values()), sum(part["dropped"].values())
        lines.append(f"{part['part']:<32} " + " ".join(f"{n:>9}" for n in counts) + f"  {reasons}".rstrip())
    return "\n".join(lines) + "\n"


def size_text(count: float) -> str:
    """Returns a number of bytes as text, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def estimate(reports: Iterable[Mapping[str, Any]], all_bytes: int) -> float:
    """Estimates the data set's size in bytes from some parts' reports, in proportion to the `all_bytes` of all tars."""
    stored = read = 0
    for report in reports:
        stored, read = stored + report["stored_bytes"], read + report["tar_bytes"]
    return stored / max(1, read) * all_bytes


def histograms(report: Mapping[str, Any], root: Path) -> list[Path]:
    """Draws histograms of token lengths and of picture sizes as PNG; returns their paths."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = []
    for name, key, label, width in (
        (TOKENS, "tokens", "tokens of a caption", 1),
        (SIZES, "sizes", "shorter side of a picture, in pixels", SIZE_STEP),
    ):
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        bins = [int(k) for k in report[key]]
        axes.bar(bins, list(report[key].values()), width=width, align="edge" if width > 1 else "center")
        axes.set(xlabel=label, ylabel="samples", title=f"{counted(report['written'], 'sample')}")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        temporary = root / schema.WORK / temporary_name(name)
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
        temporary.replace(root / name)
        drawn.append(root / name)
    return drawn


def write_reports(root: Path, card: schema.Card, remote: Remote | None = None) -> dict[str, Any]:
    """Writes the data set's reports from those of its parts, and uploads them; returns the content of report.json."""
    report = summary(part_reports(root), card)
    paths = [
        schema.write_file(root, JSON, json.dumps(report, indent=1, ensure_ascii=False) + "\n"),
        schema.write_file(root, TEXT, table(report, card)),
        *histograms(report, root),
    ]
    for path in paths:
        if remote is not None:
            remote.upload(path, path.name)
    return report
