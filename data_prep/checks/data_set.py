"""Check of the files over all parts: the card, the null text, the sets' indexes, the report."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from PIL import Image

from data_prep import schema
from data_prep.checks.damage import MALFORMED, Damage, DamagedFile, Files, Json, collect_damage, difference
from data_prep.checks.part import PartCheck
from data_prep.worker import report as reports
from data_prep.worker.parts import count_samples, count_shards, part_shards, read_part_report


def read_card(files: Files) -> tuple[schema.Card | None, list[Damage]]:
    """Reads the card; returns None and the damage where it cannot be used. Raises FileNotFoundError without a data set."""
    if schema.CARD not in files.sizes and not files.parts():
        raise FileNotFoundError(f"{files.data} is no data set: it has neither {schema.CARD} nor {schema.REPORTS}/")
    damages: list[Damage] = []
    with collect_damage(damages):
        files.read(schema.CARD)
        try:
            return schema.Card.load(files.root), []
        except ValueError as error:
            raise DamagedFile(schema.CARD, "is damaged, was changed by hand, or is of another version") from error
    return None, damages


def parts_in_report(files: Files) -> set[str]:
    """Returns the parts that report.json names, none where it cannot be read; those without a report are missing."""
    try:
        names = {str(line["part"]) for line in files.json(reports.JSON)["parts"]}
    except (DamagedFile, *MALFORMED):
        return set()
    return {n for n in names if re.fullmatch(r"[A-Za-z0-9][\w-]*/[^/]+", n) and not n.endswith(("/.", "/.."))}


def check_data_set(files: Files, card: schema.Card | None, parts: dict[str, PartCheck]) -> list[Damage]:
    """Checks the files that are made from all parts; the sums only if every part's report is valid."""
    damages: list[Damage] = []
    sets = _check_indexes(files, parts, damages)
    if card is None:
        return damages
    with collect_damage(damages):
        _check_null_text(files, card)
    if not card.complete:
        damages.append(Damage(schema.CARD, "is not finished: parts are missing, or are being made"))
    elif all(part.report_valid for part in parts.values()):
        _check_sums(files, card, sorted(parts), sets, damages)
    for name in (reports.TOKENS, reports.SIZES):
        with collect_damage(damages):
            files.read(name)
            try:
                with Image.open(files.root / name) as picture:
                    picture.verify()
            except Exception as error:  # Pillow promises no set of exceptions for damaged pictures
                raise DamagedFile(name, f"is no picture ({error})") from error
    return damages


def _check_indexes(files: Files, parts: dict[str, PartCheck], damages: list[Damage]) -> dict[str, Json]:
    """Compares each set's index with those of its parts; returns shards and bytes by the readable ones, for the card.

    Entries of a part whose own index may be damaged are not compared.
    """
    readable = {}
    for folder in sorted({f"{name.split('/')[0]}/{set_}" for name, part in parts.items() for set_ in part.sets}):
        file, (source, set_) = f"{folder}/{schema.INDEX}", folder.split("/")
        with collect_damage(damages):
            by_part: dict[str, list[Json]] = {}
            try:
                entries = files.json(file)["shards"]
                readable[folder] = count_shards(entries)
                for shard in entries:
                    by_part.setdefault(shard["raw_data"]["basename"].split("/")[0], []).append(shard)
            except MALFORMED as error:
                raise DamagedFile(file, f"is no index of shards ({type(error).__name__}: {error})") from error
            expected = []
            for name, part in sorted((n, p) for n, p in parts.items() if n.startswith(f"{source}/")):
                part_name = name.split("/")[1]
                if not part.report_valid or any(d.file.startswith(f"{folder}/{part_name}/") for d in part.damages):
                    expected += by_part.get(part_name, [])
                elif set_ in part.sets:
                    expected += part_shards(files.root / folder, part_name)
            if entries != expected:
                raise DamagedFile(file, "is not what the indexes of its parts give")
    return readable


def _check_null_text(files: Files, card: schema.Card) -> None:
    files.read(schema.NULL_TEXT)
    try:
        text = schema.load_null_text(files.root)
    except Exception as error:  # safetensors has exceptions of its own
        raise DamagedFile(schema.NULL_TEXT, f"cannot be read ({error})") from error
    width = card.text_encoder["width"]
    if text.ndim != 2 or not 1 <= len(text) <= card.token_cap or text.shape[1] != width:
        raise DamagedFile(schema.NULL_TEXT, f"is {list(text.shape)}, expected [1 to {card.token_cap}, {width}]")
    if text.dtype != torch.bfloat16 or not text.isfinite().all():
        raise DamagedFile(schema.NULL_TEXT, "is not bfloat16, or not finite")


def _check_sums(
    files: Files, card: schema.Card, names: list[str], sets: dict[str, Json], damages: list[Damage]
) -> None:
    """Compares report.json, report.txt and the card with the parts' reports and the sets' indexes."""
    about: dict[str, Json] = {}

    def part_reports() -> Iterator[tuple[str, Json]]:
        for name in names:
            report = read_part_report(files.root, name)
            assert report is not None, name
            count_samples(about, name.split("/")[0], report)
            yield name, report

    expected_report = reports.summary(part_reports(), card)
    with collect_damage(damages):
        if other := difference(files.json(reports.JSON), expected_report):
            raise DamagedFile(reports.JSON, other)
    with collect_damage(damages):
        if files.text(reports.TEXT) != reports.table(expected_report, card):
            raise DamagedFile(reports.TEXT, "is not what the parts give")
    found, expected = (
        {"counts": card.counts, "sets": card.sets},
        {"counts": reports.card_counts(expected_report), "sets": about},
    )
    if sets.keys() == about.keys():
        expected["sets"] = {folder: {**details, **sets[folder]} for folder, details in about.items()}
    else:  # an index that cannot be read is a damage of its own
        del found["sets"], expected["sets"]
    with collect_damage(damages):
        if other := difference(found, expected):
            raise DamagedFile(schema.CARD, other)
