"""Judging by people: a page that shows A's and B's pictures side by side and blind; with --votes, the sum of its votes.

A and B are folders that `pretrain.sample` made from one file of prompts.

    python -m pretrain.evaluate pairwise A B                                  judging.html, which people open in a browser
    python -m pretrain.evaluate pairwise A B --votes votes_ann.json votes_bo.json       what they think, in judging.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from data_prep.common.files import atomic_write
from data_prep.common.paths import path
from data_prep.common.words import counted
from pretrain.evaluate.pairs import Drawn, Matched, Placed, arrange, match_folders, page_id
from pretrain.evaluate.pairwise_page import judging_page
from pretrain.evaluate.votes import (
    CONFIDENCE,
    Ballot,
    binomial_interval,
    cohen_kappa,
    fleiss_kappa,
    read_ballots,
    sign_test,
)
from pretrain.sampling.options import require_at_least

QUESTION = "Which picture is better for this prompt?"
NAMED = 3  # prompts without partner that are named


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("a", type=path, metavar="A", help="folder made by pretrain.sample")
    parser.add_argument("b", type=path, metavar="B", help="another, of the same prompts")
    parser.add_argument("--votes", type=path, nargs="+", metavar="FILE", help="files saved from the page: sums them up")
    parser.add_argument("--out", type=path, help="file to write (default: judging.html; with --votes judging.json)")
    page = parser.add_argument_group("the page", "Votes carry these settings with them: leave them out with --votes.")
    page.add_argument("--question", help=f"what judges are asked (default: {QUESTION})")
    page.add_argument("--pairs", type=int, help="the number of pairs, drawn at random (default: all)")
    page.add_argument("--seed", type=int, help="of the order and the sides (default: 0)")
    page.add_argument("--side", type=int, help="longer side in px that larger pictures are brought to (default: as is)")


def run(args: argparse.Namespace) -> str:
    """Writes the page, or with `--votes` the sum. Returns what to print."""
    require_at_least({"--pairs": (args.pairs, 1), "--side": (args.side, 16), "--seed": (args.seed, 0)})
    if args.question is not None and not args.question.strip():
        raise ValueError("--question: is empty; write what judges are to decide")
    out = args.out or Path("judging.json" if args.votes else "judging.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    return sum_up(args, out) if args.votes else write_page(args, out)


# ---- the page ----


def write_page(args: argparse.Namespace, out: Path) -> str:
    """Writes the judging page. Returns what it holds, and what was left out."""
    matched = match_folders(args.a, args.b)
    seed = args.seed or 0
    count = min(args.pairs or len(matched.pairs), len(matched.pairs))
    placed = arrange(matched.pairs, seed, count)
    atomic_write(out, judging_page(placed, args.question or QUESTION, seed, args.side))
    megabytes = max(out.stat().st_size / 1e6, 0.1)
    lines = [
        *notes(matched, args.a, args.b),
        f"{out}: {counted(count, 'pair')}, {megabytes:.1f} MB, for any browser; who judges saves a file of votes. Sum them up:",
        f"python -m pretrain.evaluate pairwise {args.a} {args.b} --votes FILES",
    ]
    return "\n".join(lines)


def notes(matched: Matched, a: Path, b: Path) -> list[str]:
    """A line for each thing that the page leaves out or cannot hide."""
    lines = []
    for folder in (a, b):
        alone = [drawn for drawn in matched.without if drawn.path.parent == folder]
        if alone:
            lines.append(f"{folder}: left out {counted(len(alone), 'picture')} without partner: {_prompts(alone)}")
    if matched.equal:
        lines.append(f"left out {counted(matched.equal, 'pair')} of equal pictures")
    unequal = [pair for pair in matched.pairs if pair.a.size != pair.b.size]
    if unequal:
        (width, height), (other_width, other_height) = unequal[0].a.size, unequal[0].b.size
        lines.append(
            f"{counted(len(unequal), 'pair')} of pictures of different size, such as {width}×{height} and "
            f"{other_width}×{other_height} px: shown equally large, but one may look sharper; --side makes them alike"
        )
    return lines


def _prompts(alone: Sequence[Drawn]) -> str:
    shown = ", ".join(f"{drawn.prompt!r}" for drawn in alone[:NAMED])
    return shown + (f" and {len(alone) - NAMED} more" if len(alone) > NAMED else "")


# ---- the sum ----


def sum_up(args: argparse.Namespace, out: Path) -> str:
    """Sums up the votes and writes them. Returns the table."""
    for name in ("question", "pairs", "seed", "side"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: is a setting of the page, which the votes carry with them; leave it out")
    ballots = read_ballots(args.votes)
    placed = shown_pairs(args.a, args.b, ballots[0], args.votes[0])
    winners = [winners_of(ballot, placed, file) for ballot, file in zip(ballots, args.votes, strict=True)]
    report = summary(ballots, placed, winners) | {"a": str(args.a), "b": str(args.b)}
    atomic_write(out, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return "\n".join([f"A: {args.a}", f"B: {args.b}", *table(report), f"see {out}"])


def shown_pairs(a: Path, b: Path, ballot: Ballot, file: Path) -> list[Placed]:
    """The pairs of the page that a ballot was given on. Raises ValueError where it was made from other pictures."""
    pairs = match_folders(a, b).pairs
    placed = arrange(pairs, ballot.seed, min(ballot.pairs, len(pairs)))
    if ballot.pairs > len(pairs) or page_id(placed, ballot.question, ballot.seed, ballot.side) != ballot.page:
        raise ValueError(
            f"{file}: votes of another page than that of {a} and {b}; give the folders that it was made from, unchanged and "
            "in the same order"
        )
    return placed


def winners_of(ballot: Ballot, placed: Sequence[Placed], file: Path) -> dict[str, str]:
    """For each pair that a judge voted on, "a", "b" or "tie". Raises ValueError for a pair that the page does not have."""
    sides = {p.pair.id: {"left": "ab"[not p.a_is_left], "right": "ab"[p.a_is_left], "tie": "tie"} for p in placed}
    unknown = [vote.pair for vote in ballot.votes if vote.pair not in sides]
    if unknown:
        raise ValueError(f"{file}: its page has no pair {unknown[0]}; save the votes again from the page")
    return {vote.pair: sides[vote.pair][vote.choice] for vote in ballot.votes}


def summary(
    ballots: Sequence[Ballot], placed: Sequence[Placed], winners: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """All figures: of the votes, of the pairs by majority, of each judge, and the judges' agreement."""
    by_pair = {p.pair.id: Counter(of[p.pair.id] for of in winners if p.pair.id in of) for p in placed}
    majorities = ["tie" if n["a"] == n["b"] else max("ab", key=n.__getitem__) for n in by_pair.values() if n]
    judges = []
    for ballot, of in zip(ballots, winners, strict=True):
        sided = [vote.choice for vote in ballot.votes if vote.choice != "tie"]
        left = sided.count("left") / len(sided) if sided else None
        judges.append({"judge": ballot.judge, "left_share": left, **score(of.values())})
    return {
        "page": ballots[0].page,
        "question": ballots[0].question,
        "seed": ballots[0].seed,
        "side": ballots[0].side,
        "confidence": CONFIDENCE,
        "votes": score(winner for of in winners for winner in of.values()),
        "pairs": {"on_the_page": len(placed), **score(majorities)},
        "judges": judges,
        "agreement": agreement([b.judge for b in ballots], winners),
        "by_pair": [
            {"prompt": p.pair.a.prompt, "a_file": p.pair.a.path.name, "b_file": p.pair.b.path.name, **_counts(n)}
            for p, n in zip(placed, by_pair.values(), strict=True)
        ],
    }


def _counts(n: Counter[str]) -> dict[str, int]:
    return {"a_wins": n["a"], "b_wins": n["b"], "ties": n["tie"]}


def score(winners: Any) -> dict[str, Any]:
    """Wins, ties, A's share of the untied with its exact binomial interval, and p of the two-sided binomial test."""
    n = Counter(winners)
    untied = n["a"] + n["b"]
    return {
        **_counts(n),
        "a_share": n["a"] / untied if untied else None,
        "interval": list(binomial_interval(n["a"], untied)),
        "p": sign_test(n["a"], n["b"]),
    }


def agreement(judges: Sequence[str], winners: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Cohen's kappa of each two judges, and with more than two Fleiss' kappa of all, on the pairs on which all of them voted."""
    cohen = []
    for (name, one), (other_name, other) in combinations(zip(judges, winners, strict=True), 2):
        common = [key for key in one if key in other]
        if common:
            alike = sum(one[key] == other[key] for key in common) / len(common)
            kappa = cohen_kappa([one[key] for key in common], [other[key] for key in common])
            cohen.append({"judges": [name, other_name], "pairs": len(common), "alike": alike, "kappa": kappa})
    common = [key for key in winners[0] if all(key in of for of in winners)]
    fleiss = None
    if len(judges) > 2 and common:
        kappa = fleiss_kappa([[of[key] for of in winners] for key in common])
        fleiss = {"pairs": len(common), "kappa": kappa}
    return {"cohen": cohen, "fleiss": fleiss}


def table(report: Mapping[str, Any]) -> list[str]:
    """The summary in words."""
    judges = report["judges"]
    rows = [(f"votes of {counted(len(judges), 'judge')}", report["votes"])]
    if len(judges) > 1:
        rows.append(("pairs by majority", report["pairs"]))
    rows += [(judge["judge"], judge) for judge in judges if len(judges) > 1]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{'':<{width}}{'A wins':>8}{'B wins':>8}{'ties':>6}   A's share of the untied  p"]
    for name, row in rows:
        share = "none is untied"
        if row["a_share"] is not None:
            low, high = row["interval"]
            share = f"{100 * row['a_share']:.1f}% ({100 * low:.1f} to {100 * high:.1f}%)"
        lines.append(f"{name:<{width}}{row['a_wins']:>8}{row['b_wins']:>8}{row['ties']:>6}   {share:<25}{row['p']:.3g}")
    whole = report["pairs"]["on_the_page"]
    for judge in judges:
        voted = judge["a_wins"] + judge["b_wins"] + judge["ties"]
        if voted < whole:
            lines.append(f"{judge['judge']} has judged {voted} of {whole} pairs")
    fleiss = report["agreement"]["fleiss"]
    if fleiss:
        lines.append(f"Fleiss' kappa of all judges: {_kappa(fleiss['kappa'])} on {counted(fleiss['pairs'], 'pair')}")
    for two in report["agreement"]["cohen"]:
        lines.append(
            f"Cohen's kappa of {' and '.join(two['judges'])}: {_kappa(two['kappa'])} on {counted(two['pairs'], 'pair')}, "
            f"{100 * two['alike']:.0f}% alike"
        )
    return lines


def _kappa(kappa: float | None) -> str:
    return "none, as all votes are the same" if kappa is None else f"{kappa:.2f}"
