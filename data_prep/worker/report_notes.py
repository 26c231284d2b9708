"""Notes of a report: where captions came from, what the text encoder does not know, and what a user should look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_prep import schema
from data_prep.inputs.contents import Contents
from data_prep.inputs.finder import counted_inputs
from data_prep.inputs.sources import make_source
from data_prep.inputs.survey import absent_captions, absent_fields

COUNTS = ("members", "fields", "texts", "captions", "unknown")  # of a part's report, which those of 0.1.0 lack
_SHOWN = 20  # names in a line, and inputs in a list


def is_asked_for(reason: str) -> bool:
    """Returns whether samples are dropped for a reason that the user has set, and not for what is wrong with them."""
    return reason.startswith("filtered by ") or reason in ("duplicate", "caption_too_long", "unknown_tokens")


def notes(report: Mapping[str, Any], card: schema.Card) -> list[str]:
    """Returns the lines of report.txt on captions, tokens and fields. Reports of 0.1.0 have none."""
    lines = []
    if captions := report.get("captions"):
        lines.append(f"  captions come from {_counted(captions)}")
    if "unknown" in report and report["written"]:
        tokens = (
            sum(int(length) * count for length, count in report["tokens"].items()) - report["written"]
        )  # without ends
        unknown = report["unknown"]
        lines.append(
            f"  {unknown['tokens'] / max(1, tokens):.2%} of the tokens are unknown to {card.text_encoder.get('name')}, in "
            f"{unknown['captions'] / report['written']:.2%} of the captions"
        )
    if fields := report.get("fields", {}) | report.get("members", {}):
        lines.append(f"  samples have {_counted(fields)}")
    return lines


def warnings(report: Mapping[str, Any], card: schema.Card) -> list[str]:
    """Returns what a user should look at: names that no sample has, inputs that are not whole, and more than half dropped."""
    found = []
    for name, counts in report["sources"].items():
        choices = card.choices.get("sources", {}).get(name)
        if choices is None or "members" not in counts or not counts["read"]:
            continue
        source = make_source(name, [], choices["captions"], choices["filter"])
        members, fields, texts = (Counter(counts.get(key, {})) for key in ("members", "fields", "texts"))
        contents = Contents(counts["read"], members, fields, texts)
        where = f"{name}, of {counts['read']} samples"
        found += absent_captions(source, contents, where) + absent_fields(source, contents, where)
    unwanted = {reason: count for reason, count in report["dropped"].items() if not is_asked_for(reason)}
    if 2 * sum(unwanted.values()) > report["read"]:
        found.append(f"more than half is dropped: {sum(unwanted.values())} of {report['read']} ({_counted(unwanted)})")
    if torn := [part for part in report["parts"] if part.get("incomplete")]:
        rest = f"\n  and {len(torn) - _SHOWN} more" if len(torn) > _SHOWN else ""
        found.append(
            f"{counted_inputs([part['tar'] for part in torn])} not whole; fetch again, and run the command with --changed "
            "remake:\n" + "\n".join(f"  {part['tar']}: {part['incomplete']}" for part in torn[:_SHOWN]) + rest
        )
    return found


def _counted(counts: Mapping[str, int]) -> str:
    names = [f"{name} {count}" for name, count in counts.items()]
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
