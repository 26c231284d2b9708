"""Votes of judges: files that the judging page exports, the binomial interval and test, and the judges' agreement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

CONFIDENCE = 0.95
SIDES = ("left", "right", "tie")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Vote(_Strict):
    """Choice of one judge for one pair, by the side on which the picture stood."""

    pair: str
    choice: Literal["left", "right", "tie"]


class Ballot(_Strict):
    """All votes of one judge, as the page exports them, with the settings of the page from which it is made again."""

    page: str
    seed: int
    question: str
    side: int | None = Field(description="Longer side in px to which the pictures were brought; None: as they are.")
    pairs: int = Field(ge=1, description="Number of pairs on the page.")
    judge: str = Field(min_length=1)
    votes: list[Vote] = Field(min_length=1)

    @field_validator("votes")
    @classmethod
    def _one_each(cls, votes: list[Vote]) -> list[Vote]:
        pair, times = Counter(vote.pair for vote in votes).most_common(1)[0]
        if times > 1:
            raise ValueError(f"pair {pair} has {times} votes, expected one")
        return votes


def read_ballots(paths: Sequence[Path]) -> list[Ballot]:
    """The ballots of several judges on one page.

    Raises ValueError for a file that is no ballot, of another page than the first, or of a judge who has another file, too.
    """
    ballots: list[Ballot] = []
    files: dict[str, Path] = {}
    for path in paths:
        ballot = _read_ballot(path)
        if ballots and ballot.page != ballots[0].page:
            raise ValueError(f"{path}: votes of another page ({ballot.page}) than {paths[0]} ({ballots[0].page})")
        name = " ".join(ballot.judge.casefold().split())
        if name in files:
            raise ValueError(
                f"{path}: the votes of judge {ballot.judge!r} are already in {files[name]}; give one file for each judge"
            )
        files[name] = path
        ballots.append(ballot)
    return ballots


def _read_ballot(path: Path) -> Ballot:
    if not path.is_file():
        raise FileNotFoundError(f"--votes {path}: no such file")
    try:
        return Ballot.model_validate_json(path.read_bytes())
    except ValidationError as error:
        what = error.errors()[0]
        field = ".".join(str(part) for part in what["loc"])
        problem = f"{field + ': ' if field else ''}{what['msg']}"
        raise ValueError(f"{path} holds no votes as the judging page exports them ({problem})") from error


# ---- one proportion ----


def at_most(k: int, n: int, p: float) -> float:
    """P(X ≤ k) of a binomial X with n trials of probability 0 < p < 1."""
    log_p, log_q = math.log(p), math.log1p(-p)
    logs = (
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_p + (n - i) * log_q
        for i in range(k + 1)
    )
    return min(1.0, math.fsum(math.exp(value) for value in logs))


def binomial_interval(wins: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Exact interval of a proportion (Clopper and Pearson, Biometrika 1934); (0, 1) without trials."""
    tail = (1 - confidence) / 2
    low = 0.0 if wins == 0 else _where(wins - 1, n, 1 - tail)
    high = 1.0 if wins == n else _where(wins, n, tail)
    return low, high


def _where(k: int, n: int, level: float) -> float:
    """The p at which P(X ≤ k), which falls with p, has the level."""
    low, high = 0.0, 1.0
    for _ in range(50):  # to 2**-50
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(k, n, middle) > level else (low, middle)
    return (low + high) / 2


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of the exact binomial test of wins against losses, each being as likely; 1 without any."""
    return min(1.0, 2 * at_most(min(wins, losses), wins + losses, 0.5))


# ---- agreement ----


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Agreement of two judges on the same pairs beyond chance (Cohen 1960); None where all their votes are the same one."""
    n = len(first)
    observed = sum(x == y for x, y in zip(first, second, strict=True)) / n
    counts, others = Counter(first), Counter(second)
    by_chance = sum(counts[name] * others[name] for name in counts) / n**2
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def fleiss_kappa(votes: Sequence[Sequence[str]]) -> float | None:
    """Agreement of several judges beyond chance (Fleiss 1971); None where all votes are the same one.

    votes: for each pair the votes of its judges, of equal number, at least 2.
    """
    judges = len(votes[0])
    total: Counter[str] = Counter(name for row in votes for name in row)
    by_chance = sum((count / (judges * len(votes))) ** 2 for count in total.values())
    agreeing = sum(count * (count - 1) for row in votes for count in Counter(row).values())
    observed = agreeing / (len(votes) * judges * (judges - 1))
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)
